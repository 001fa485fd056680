"""Every kernel but attention, which measures its own error (`attention.py`), against float64 on random numbers. An
error is a norm of the difference over that of what is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from benchmarks.gpu import products
from benchmarks.gpu.parts import in_parts
from benchmarks.gpu.verdicts import MOST_PRODUCT_ERROR

from pelton.core.sampling_params import SamplingParams
from pelton.weights.lora.adapter import LoraModule, LoraWeights
from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.ops import LoraSite
from pelton.worker.kernels.triton.activation import gelu_tanh_mul, silu_mul, softcap
from pelton.worker.kernels.triton.block_copies import copy_block
from pelton.worker.kernels.triton.embedding import embedding, put_late_tokens
from pelton.worker.kernels.triton.linear import LinearWeight, Scratch, linear
from pelton.worker.kernels.triton.lora import TritonAdapter, add_lora
from pelton.worker.kernels.triton.moe import TritonExperts, moe
from pelton.worker.kernels.triton.norm import add_rms_norm, add_rms_norm_rounded, rms_norm
from pelton.worker.kernels.triton.quantize_rows import quantize_rows
from pelton.worker.kernels.triton.rotary import rotate_and_store, split_heads
from pelton.worker.kernels.triton.sampling import DeviceSampler
from pelton.worker.kernels.triton.weights import DenseWeight, Weights
from pelton.worker.sampling.reference import ReferenceSampler

_MOST = {torch.float32: 1e-5, torch.bfloat16: 6e-3}
Group = Callable[[torch.dtype, torch.device, bool], dict[str, float]]


def kernels(tiny: bool) -> Iterator[dict[str, Any]]:
    device = torch.device("cpu" if tiny else "cuda")
    parts: list[tuple[str, Callable[[], Iterable[dict[str, Any]]]]] = []
    for dtype in _MOST:
        # The interpreter cuts float32 to bfloat16 where a GPU rounds, and experts are several products deep.
        most = _MOST[dtype] * (3 if tiny else 1)
        for group in GROUPS[dtype]:
            name = f"{group.__name__.strip('_')}, {str(dtype).removeprefix('torch.')}"
            parts.append((name, partial(_compared, name, group, dtype, device, (tiny, most))))
    parts += [(f"product, {kind}", partial(_product, kind, device, tiny)) for kind in products.KINDS]
    return in_parts([*parts, ("sampling", partial(_sampling, device, tiny))])


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """For `warm.py`: nothing of what they say is so where nothing is run."""
    for dtype, groups in GROUPS.items():
        for group in groups:
            yield f"{group.__name__}, {dtype}", partial(group, dtype, torch.device("cpu"), False)
    for kind in products.KINDS:
        yield f"product, {kind}", lambda kind=kind: list(_product(kind, torch.device("cpu"), False))


def _compared(
    name: str,
    group: Group,
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
    total = x.double() + residual.double()
    normed, kept = add_rms_norm(x.clone(), residual.clone(), weight, 1e-5)
    _same_codes(dtype, device)
    for row in (0, num_rows - 1):  # law 3, on the way
        assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-5)[0], rms_norm(x, weight, 1e-5)[row])
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


def _blocks(dtype: torch.dtype, device: torch.device, tiny: bool) -> dict[str, float]:
    """What is copied and put in place: equal, not near."""
    _, _, heads, head_dim = _sizes(tiny)
    pool = torch.randn(3, 2, 5, 16, heads[1], head_dim, device=device).to(dtype)
    copy_block(pool[:, :, 1], pool[:, :, 4])
    packed = torch.empty_like(pool[:, :, 4], memory_format=torch.contiguous_format)
    copy_block(packed, pool[:, :, 4])
    tokens = torch.full((9,), 7, dtype=torch.int32, device=device)
    rows = torch.tensor([-1, 2, 0, -1, 1, 2, -1, -1, 0], dtype=torch.int32, device=device)
    late = torch.tensor([30, -1, 32], dtype=torch.int64, device=device)
    put_late_tokens(tokens, rows, late)
    expected = torch.where(rows < 0, 7, late[rows.clamp_min(0).long()].clamp_min(0))
    return {
        "copy": _error(pool[:, :, 1], pool[:, :, 4].double()),
        "pack": _error(packed, pool[:, :, 4].double()),
        "late": _error(tokens, expected.double()),
    }


def _experts(dtype: torch.dtype, device: torch.device, tiny: bool) -> dict[str, float]:
    """Routing among experts, products of each row with its own, and their sum."""
    num_rows, size, inner, num_experts = (9, 64, 32, 4) if tiny else (100, 1024, 384, 16)
    gate_up = (torch.randn(num_experts, 2 * inner, size, device=device) * size**-0.5).to(dtype)
    down = (torch.randn(num_experts, size, inner, device=device) * inner**-0.5).to(dtype)
    x = torch.randn(num_rows, size, device=device).to(dtype)
    logits = torch.randn(num_rows, num_experts, device=device)  # of which no two are equal
    experts = TritonExperts(DenseWeight("float", gate_up), DenseWeight("float", down), num_experts, Scratch(device))
    found = moe(x, logits, experts, 2, True, silu_mul)
    gate, up = torch.einsum("th,eoh->teo", x.double(), gate_up.double()).chunk(2, dim=-1)
    each = torch.einsum("teo,eho->teh", torch.nn.functional.silu(gate) * up, down.double())
    greatest = logits.double().topk(2)
    shares = torch.zeros_like(logits, dtype=torch.float64)
    shares.scatter_(1, greatest.indices, greatest.values.softmax(-1))
    return {"moe": _error(found, torch.einsum("te,teh->th", shares, each))}


def _adapters(dtype: torch.dtype, device: torch.device, tiny: bool) -> dict[str, float]:
    """Rows of two LoRA adapters of other ranks, and rows of none."""
    widths, num_inputs = ((24, 8), 40) if tiny else ((4096, 1024), 4096)
    sites = [LoraSite((("q", widths[0]), ("k", widths[1])), num_inputs)]
    x = torch.randn(30, num_inputs, device=device).to(dtype)
    expected = torch.zeros(30, sum(widths), dtype=torch.float64, device=device)
    adapters = []
    for number, rank in enumerate((16, 5)):
        rows, first = np.arange(3 + number, 26, 2), 0
        modules: dict[str, LoraModule] = {}
        for name, width in zip("qk", widths, strict=True):
            a, b = (torch.randn(shape) * shape[1] ** -0.5 for shape in ((rank, num_inputs), (width, rank)))
            modules[name] = LoraModule(_stored(a), _stored(b), 0.5 + number)
            a, b = (each.to(device, dtype).double() for each in (a, b))
            expected[rows, first : first + width] = (0.5 + number) * x[rows].double() @ a.T @ b.T
            first += width
        adapters.append((TritonAdapter(LoraWeights(str(number), modules, None), sites, dtype, device), rows))
    found = add_lora(torch.zeros(30, sum(widths), dtype=dtype, device=device), x, 0, tuple(adapters))
    return {"lora": _error(found, expected)}


def _product(kind: str, device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """Rows of every tile with one weight, beside what its rounded values stand for; a row's bits in any company."""
    torch.manual_seed(0)
    outputs, inputs = (72, 256) if tiny else (1024, 4096)
    matrix = (torch.randn(outputs, inputs, device=device) * inputs**-0.5).bfloat16()
    weight, exact = products.make(kind, matrix)
    scratch = Scratch(device)
    scratch.reserve(weight)
    whole = LinearWeight(Weights((weight,)), scratch, True)
    x = torch.randn(100, inputs, device=device).bfloat16()
    found = {num_rows: linear(x[:num_rows], whole) for num_rows in (1, 20, 60, 100)}
    errors = {f"{num_rows} rows": _error(y, x[:num_rows].double() @ exact.T) for num_rows, y in found.items()}
    yield {"part": f"product, {kind}", "most_error": MOST_PRODUCT_ERROR[kind] * (2 if tiny else 1), **errors}
    if not tiny:  # the interpreter multiplies with numpy, which sums up by a matrix's shape
        assert all(torch.equal(y, found[100][: len(y)]) for y in found.values()), "other bits in other company"


def _stored(values: torch.Tensor) -> WeightTensor:
    return WeightTensor("", tuple(values.shape), "F32", values.numpy().reshape(-1).view(np.uint8))


# Products of float32 are what the item of equal text is for.
GROUPS: dict[torch.dtype, tuple[Group, ...]] = {
    torch.float32: (_norms, _activations, _embedding, _rotary, _blocks),
    torch.bfloat16: (_norms, _activations, _embedding, _rotary, _blocks, _experts, _adapters),
}


def _sampling(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """Tokens and logprobs of the reference, which draws from integers: equal, not near."""
    size, count = (500, 10) if tiny else (128_256, 64)
    logits = np.random.default_rng(0).standard_normal((count, size), np.float32) * np.float32(4)
    kinds = (
        SamplingParams(temperature=0.0, logprobs=2),
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(temperature=1.0, top_k=50, min_p=0.02),
        SamplingParams(temperature=0.7, presence_penalty=0.5, logit_bias={3: 5.0}),
        SamplingParams(temperature=0.9, repetition_penalty=1.2, min_tokens=4, banned_token_ids=(5,)),
    )
    # A grammar's, of every other request: two tokens in three.
    allowed = np.packbits(np.arange(-(-size // 32) * 32) % 3 > 0, bitorder="little").view(np.uint32)
    masks = [allowed if i % 2 else None for i in range(count)]
    found = []
    for sampler in (ReferenceSampler(size, {0}), DeviceSampler(size, {0}, device)):
        rows: list[Any] = [sampler.make_row(kinds[i % len(kinds)], i) for i in range(count)]
        found.append(sampler.sample(logits.copy(), rows, list(range(count)), masks))
    assert found[0].token_ids == found[1].token_ids, "the device draws other tokens than the reference"
    yield {"sampled": count}


def _normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())
