"""Launches for `scripts/compile_triton.py`, with the sizes of Llama 3.1 8B and Qwen3 30B-A3B."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import torch
from benchmarks.gpu import attention_cases

from pelton.core.sampling_params import SamplingParams
from pelton.weights.lora.adapter import LoraModule, LoraWeights
from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.ops import LoraSite
from pelton.worker.kernels.triton.activation import gelu_tanh_mul, silu_mul, softcap
from pelton.worker.kernels.triton.block_copies import copy_block
from pelton.worker.kernels.triton.embedding import embedding, put_late_tokens
from pelton.worker.kernels.triton.linear import LinearWeight, Scratch, expand, linear
from pelton.worker.kernels.triton.lora import TritonAdapter, add_lora
from pelton.worker.kernels.triton.moe import TritonExperts, moe
from pelton.worker.kernels.triton.norm import add_rms_norm_rounded, rms_norm
from pelton.worker.kernels.triton.rotary import rotate_and_store, split_heads
from pelton.worker.kernels.triton.sampling import DeviceSampler
from pelton.worker.kernels.triton.weights import DenseWeight, PackedWeight, Weights

_CPU = torch.device("cpu")


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    yield from attention_cases.cases()
    yield from _norms()
    yield from _elementwise()
    yield from _products()
    yield from _experts()
    yield from _lora()
    yield from sampling()


def _norms() -> Iterator[tuple[str, Callable[[], object]]]:
    weight = torch.empty(4096)
    for num_rows in (1, 512):
        x = torch.empty(num_rows, 4096, dtype=torch.bfloat16)
        yield f"norm, {num_rows} rows", lambda x=x: rms_norm(x, weight, 1e-6)
        for kind in ("int8", "fp8", "fp8_block"):
            yield (
                f"norm rounded to {kind}, {num_rows} rows",
                lambda x=x, kind=kind: add_rms_norm_rounded(x, x.clone(), weight, 1e-6, kind),
            )


def _elementwise() -> Iterator[tuple[str, Callable[[], object]]]:
    angles, slots = torch.empty(9, 64), torch.zeros(9, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        query, key, value = split_heads(torch.empty(9, 48 * 128, dtype=dtype), 32, 8)
        caches = torch.empty(2, 4, 16, 8, 128, dtype=dtype)
        wide = torch.empty(9, 28672, dtype=dtype)
        yield (
            f"rotary and write, {name}",
            lambda q=query, k=key, v=value, caches=caches: rotate_and_store(q, k, v, angles, angles, *caches, slots),
        )
        yield f"SiLU, {name}", lambda wide=wide: silu_mul(wide)
        yield f"GELU, {name}", lambda wide=wide: gelu_tanh_mul(wide)
        yield f"softcap, {name}", lambda wide=wide: softcap(wide, 30.0)
        yield f"embedding, {name}", lambda wide=wide: embedding(slots, wide, 2.0)
    pool = torch.empty(2, 2, 3, 16, 8, 128, dtype=torch.bfloat16)
    yield "copy of a block", lambda: copy_block(pool[:, :, 1], pool[:, :, 2])
    yield "late tokens", lambda: put_late_tokens(slots, slots, torch.zeros(4, dtype=torch.int64))


def _products() -> Iterator[tuple[str, Callable[[], object]]]:
    outputs, inputs = 6144, 4096
    kinds = {
        "bf16": DenseWeight("float", torch.empty(outputs, inputs, dtype=torch.bfloat16)),
        "int8": DenseWeight("int8", torch.empty(outputs, inputs, dtype=torch.int8), torch.empty(outputs)),
        "fp8": DenseWeight("fp8", torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn), torch.empty(outputs)),
        "fp8 128x128": DenseWeight(
            "fp8_block",
            torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn),
            torch.empty(outputs // 128, inputs // 128),
        ),
        "int4 groups of 128": _packed(4, 128, outputs, inputs, has_minima=False),
        "int4 groups of 32, minima": _packed(4, 32, outputs, inputs, has_minima=True),
        "int8 groups of 32": _packed(8, 32, outputs, inputs, has_minima=False),
    }
    for name, weight in kinds.items():
        scratch = Scratch(_CPU)
        scratch.reserve(weight)
        whole = LinearWeight(Weights((weight,)), scratch, True)
        for num_rows in (1, 32, 64, 512):
            x = torch.empty(num_rows, inputs, dtype=torch.bfloat16)
            yield f"{name}, {num_rows} rows", lambda x=x, whole=whole: linear(x, whole)
    yield "int4 expanded", lambda: expand(kinds["int4 groups of 128"], torch.bfloat16)  # type: ignore[arg-type]
    # Float32 has half as many stages, or fewer: what the check's item of equal text runs.
    narrow = {"": DenseWeight("float", torch.empty(704, 256)), " int4": _packed(4, 128, 704, 256, has_minima=False)}
    for name, weight in narrow.items():
        scratch = Scratch(_CPU)
        scratch.reserve(weight)
        whole = LinearWeight(Weights((weight,)), scratch, True)
        for num_rows in (1, 32, 64, 512):
            x = torch.empty(num_rows, 256)
            yield f"float32{name}, {num_rows} rows", lambda x=x, whole=whole: linear(x, whole)


def _packed(bits: int, group: int, outputs: int, inputs: int, *, has_minima: bool) -> PackedWeight:
    words = torch.empty(inputs * bits // 512, outputs, 16, dtype=torch.int32)
    scales = torch.empty(inputs // group, outputs, dtype=torch.float16)
    return PackedWeight(bits, group, words, scales, torch.empty_like(scales) if has_minima else None, inputs)


def sampling() -> Iterator[tuple[str, Callable[[], object]]]:
    size = 151_936
    logits = torch.empty(4, size)
    sampler = DeviceSampler(size, (7,), _CPU)
    edited = SamplingParams(repetition_penalty=1.2, min_tokens=4, banned_token_ids=(5,))
    yield "sampling", lambda: sampler.choose(logits, [sampler.make_row(SamplingParams(), 1)] * 4, [0] * 4)
    yield "sampling, edited", lambda: sampler.choose(logits, [sampler.make_row(edited, 1)] * 4, [0] * 4)
    with_logprobs = [sampler.make_row(SamplingParams(logprobs=20), 1)] * 4
    yield "logprobs", lambda: _ignore_answer(lambda: sampler.sample(logits, with_logprobs, [0] * 4))


def _ignore_answer(launch: Callable[[], object]) -> None:
    """Nothing ran, so what is read back means nothing."""
    with suppress(ValueError, struct.error):
        launch()


def _experts() -> Iterator[tuple[str, Callable[[], object]]]:
    gate_up = DenseWeight("float", torch.empty(128, 1536, 2048, dtype=torch.bfloat16))
    down = DenseWeight("float", torch.empty(128, 2048, 768, dtype=torch.bfloat16))
    experts = TritonExperts(gate_up, down, 128, Scratch(_CPU))
    for num_rows in (1, 64, 4096):
        x = torch.empty(num_rows, 2048, dtype=torch.bfloat16)
        logits = torch.empty(num_rows, 128, dtype=torch.bfloat16)
        yield (
            f"experts, {num_rows} rows",
            lambda x=x, logits=logits: moe(x, logits, experts, 8, True, lambda wide: wide[:, :768].contiguous()),
        )


def _lora() -> Iterator[tuple[str, Callable[[], object]]]:
    sites = [LoraSite((("q", 4096), ("k", 1024)), 4096)]
    module = LoraModule(_zeros(16, 4096), _zeros(4096, 16), 1.0)
    adapter = TritonAdapter(LoraWeights("", {"q": module}, None), sites, torch.bfloat16, _CPU)
    x, y = torch.empty(20, 4096, dtype=torch.bfloat16), torch.empty(20, 5120, dtype=torch.bfloat16)
    yield "LoRA", lambda: add_lora(y, x, 0, ((adapter, np.arange(20)),))


def _zeros(*shape: int) -> WeightTensor:
    return WeightTensor("", shape, "F32", np.zeros(shape, np.float32).reshape(-1).view(np.uint8))
