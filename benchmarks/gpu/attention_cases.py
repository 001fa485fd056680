"""Attention's launches for `scripts/compile_triton.py`, with the heads of Llama 3.1 8B, Qwen2.5 0.5B and Gemma 2 9B."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from pelton.worker.kernels.ops import AttentionShape
from pelton.worker.kernels.triton.attention import paged_attention, plan_attention
from pelton.worker.kernels.triton.attention_config import choose_config
from pelton.worker.kernels.triton.packed_kv import rotate_and_store_packed
from pelton.worker.kv_format import KV_FORMATS

_BLOCK_SIZE = 16
_LLAMA, _QWEN, _GEMMA = (32, 8, 128), (14, 2, 64), (16, 8, 256)
_DECODE, _PREFILL = [(1, 9000)], [(2000, 2000)]  # new tokens, KV length


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    yield "8B, decode", partial(_attend, _LLAMA, _DECODE)
    yield "8B, decode, small tiles", partial(_attend, _LLAMA, _DECODE, batch_invariant=False)
    yield "8B, prefill", partial(_attend, _LLAMA, _PREFILL)
    for kv_format in ("fp8", "int8", "int4"):
        yield f"8B, decode, {kv_format}", partial(_attend, _LLAMA, _DECODE, kv_format=kv_format)
    yield "8B, prefill, fp8", partial(_attend, _LLAMA, _PREFILL, kv_format="fp8")
    for kv_format in ("float16", "float32"):
        yield f"8B, decode, {kv_format}", partial(_attend, _LLAMA, _DECODE, kv_format=kv_format)
        yield f"8B, prefill, {kv_format}", partial(_attend, _LLAMA, _PREFILL, kv_format=kv_format)
    yield "0.5B, decode", partial(_attend, _QWEN, _DECODE)
    yield "0.5B, prefill", partial(_attend, _QWEN, _PREFILL)
    yield "heads of 256, decode, window, cap", partial(_attend, _GEMMA, _DECODE, window=4096, softcap=50.0)
    yield "heads of 256, prefill, window, cap", partial(_attend, _GEMMA, _PREFILL, window=4096, softcap=50.0)


def _attend(
    heads: tuple[int, int, int],
    work: list[tuple[int, int]],
    *,
    kv_format: str = "bfloat16",
    window: int | None = None,
    softcap: float | None = None,
    batch_invariant: bool = True,
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    shape = AttentionShape(num_heads, num_kv_heads, head_dim, _BLOCK_SIZE, window)
    layout = KV_FORMATS[kv_format]
    block_shape = layout.block_shape(_BLOCK_SIZE, num_kv_heads, head_dim)
    caches = [torch.empty((2, *block_shape), dtype=getattr(torch, layout.array_dtype)) for _ in range(2)]
    starts = np.cumsum([0, *(num_tokens for num_tokens, _ in work)])
    lens = np.array([seq_len for _, seq_len in work])
    tables = torch.zeros(len(work), -(-int(lens.max()) // _BLOCK_SIZE), dtype=torch.int64)
    dtype = torch.bfloat16 if layout.is_packed else caches[0].dtype
    projected = torch.empty(int(starts[-1]), num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    query, key, value = projected.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if layout.is_packed:
        angles = torch.empty(len(query), head_dim // 2)
        slots = torch.zeros(len(query), dtype=torch.int32)
        query = rotate_and_store_packed(query, key, value, angles, angles, caches[0], caches[1], slots)
    else:
        query = query.contiguous()  # as the plain write leaves it
    plan = plan_attention(shape, starts, lens, tables, choose_config(shape, batch_invariant=batch_invariant))
    paged_attention(query, caches[0], caches[1], plan, 0.1, softcap)
