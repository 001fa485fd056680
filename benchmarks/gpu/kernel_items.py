"""Every kernel that is not attention or a product against float64 on random numbers; those two measure their own error
(`attention.py`, `products.py`). `error` is a norm of the difference over that of what is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from benchmarks.gpu.parts import in_parts

from pelton.core.sampling_params import SamplingParams
from pelton.worker.kernels.triton.activation import gelu_tanh_mul, silu_mul, softcap
from pelton.worker.kernels.triton.embedding import embedding
from pelton.worker.kernels.triton.norm import add_rms_norm, add_rms_norm_rounded, rms_norm
from pelton.worker.kernels.triton.quantize_rows import quantize_rows
from pelton.worker.kernels.triton.rotary import rotate_and_store, split_heads
from pelton.worker.kernels.triton.sampling import DeviceSampler
from pelton.worker.sampling.reference import ReferenceSampler

_MOST = {torch.float32: 1e-5, torch.bfloat16: 6e-3}


def kernels(tiny: bool) -> Iterator[dict[str, Any]]:
    device = torch.device("cpu" if tiny else "cuda")
    parts: list[tuple[str, Callable[[], Iterable[dict[str, Any]]]]] = []
    for dtype in _MOST:
        # The interpreter cuts float32 to bfloat16 where a GPU rounds.
        most = _MOST[dtype] * (2 if tiny else 1)
        for group in (_norms, _activations, _embedding, _rotary):
            name = f"{group.__name__.strip('_')}, {str(dtype).removeprefix('torch.')}"
            parts.append((name, partial(_compared, name, group, dtype, device, (tiny, most))))
    return in_parts([*parts, ("sampling", partial(_sampling, device, tiny))])


def _compared(
    name: str,
    group: Callable[[torch.dtype, torch.device, bool], dict[str, float]],
    dtype: torch.dtype,
    device: torch.device,
    how: tuple[bool, float],
) -> Iterator[dict[str, Any]]:
    tiny, most = how
    torch.manual_seed(0)
    errors = {each: float(error) for each, error in group(dtype, device, tiny).items()}
    yield {"part": name, "most_error": most, **errors}


def _sizes(tiny: bool) -> tuple[int, int, tuple[int, int], int]:
    """Rows, width of a row, heads, head size."""
    return (3, 40, (4, 2), 16) if tiny else (333, 4096, (32, 8), 128)


def _norms(dtype: torch.dtype, device: torch.device, tiny: bool) -> dict[str, float]:
    num_rows, width, _, _ = _sizes(tiny)
    x, residual = (torch.randn(num_rows, width, device=device).to(dtype) for _ in range(2))
    weight = torch.rand(width, device=device)
    errors = {"rms_norm": _error(rms_norm(x, weight, 1e-5), _normed(x, weight))}
    for row in (0, num_rows - 1):  # law 3, on the way
        assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-5)[0], rms_norm(x, weight, 1e-5)[row])
    _same_codes(dtype, device)
    total = x.double() + residual.double()
    normed, kept = add_rms_norm(x.clone(), residual.clone(), weight, 1e-5)
    return errors | {"sum": _error(kept, total), "add_rms_norm": _error(normed, _normed(kept, weight))}


def _same_codes(dtype: torch.dtype, device: torch.device) -> None:
    """Rows that a norm rounds on its way are those that `quantize_rows` makes of them, to the bit."""
    x, residual = (torch.randn(19, 256, device=device).to(dtype) for _ in range(2))
    weight = torch.rand(256, device=device)
    for kind in ("int8", "fp8", "fp8_block"):
        normed, found = add_rms_norm_rounded(x.clone(), residual.clone(), weight, 1e-5, kind)
        for one, other in zip(found, quantize_rows(normed, kind), strict=True):
            assert torch.equal(one.float(), other.float()), f"a norm rounds to other codes of {kind}"


def _activations(dtype: torch.dtype, device: torch.device, tiny: bool) -> dict[str, float]:
    num_rows, width, _, _ = _sizes(tiny)
    x = torch.randn(num_rows, width, device=device).to(dtype)
    gate, up = x.double().chunk(2, dim=1)
    return {
        "silu_mul": _error(silu_mul(x), torch.nn.functional.silu(gate) * up),
        "gelu_tanh_mul": _error(gelu_tanh_mul(x), torch.nn.functional.gelu(gate, approximate="tanh") * up),
        "softcap": _error(softcap(x, 3.0), 3.0 * torch.tanh(x.double() / 3.0)),
    }


def _embedding(dtype: torch.dtype, device: torch.device, tiny: bool) -> dict[str, float]:
    num_rows, width, _, _ = _sizes(tiny)
    table = torch.randn(num_rows, width, device=device).to(dtype)
    ids = torch.randint(0, num_rows, (17,), device=device, dtype=torch.int32)
    return {"embedding": _error(embedding(ids, table, 1.5), table[ids.long()].double() * 1.5)}


def _rotary(dtype: torch.dtype, device: torch.device, tiny: bool) -> dict[str, float]:
    num_rows, _, heads, head_dim = _sizes(tiny)
    qkv = torch.randn(num_rows, (heads[0] + 2 * heads[1]) * head_dim, device=device).to(dtype)
    query, key, value = split_heads(qkv, *heads)
    angles = torch.rand(num_rows, head_dim // 2, device=device) * 1000
    cos, sin = angles.cos(), angles.sin()
    caches = torch.full((2, num_rows, 4, heads[1], head_dim), float("nan"), dtype=dtype, device=device)
    slots = torch.randperm(num_rows * 4, device=device)[:num_rows].to(torch.int32)
    rotated = rotate_and_store(query, key, value, cos, sin, caches[0], caches[1], slots)
    written = caches.flatten(1, 2)[:, slots.long()]
    turns = torch.polar(torch.ones_like(angles, dtype=torch.float64), torch.atan2(sin.double(), cos.double()))
    turns = turns * torch.hypot(cos.double(), sin.double())

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.double().chunk(2, dim=-1)
        result = torch.complex(first, second) * turns.unsqueeze(1)
        return torch.cat([result.real, result.imag], dim=-1)

    return {
        "rotary": _error(rotated, turned(query)),
        "keys": _error(written[0], turned(key)),
        "values": _error(written[1], value.double()),
    }


def _sampling(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """Tokens and logprobs of the reference, which draws from integers: equal, not near."""
    size, count = (500, 4) if tiny else (128_256, 64)
    logits = np.random.default_rng(0).standard_normal((count, size), np.float32) * np.float32(4)
    kinds = (
        SamplingParams(temperature=0.0, logprobs=2),
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(temperature=1.0, top_k=50, min_p=0.02),
        SamplingParams(temperature=0.7, presence_penalty=0.5, logit_bias={3: 5.0}),
    )
    found = []
    for sampler in (ReferenceSampler(size, {0}), DeviceSampler(size, {0}, device)):
        rows: list[Any] = [sampler.make_row(kinds[i % 4], i) for i in range(count)]
        found.append(sampler.sample(logits.copy(), rows, list(range(count))))
    assert found[0].token_ids == found[1].token_ids, "the device draws other tokens than the reference"
    yield {"sampled": count}


def _normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())
