"""Rotary embedding (Su et al., arXiv:2104.09864, in the order of GPT-NeoX) and the write of keys and values, in one.

Legend: T tokens, N query heads, K key-value heads, D head size, r rotated dimensions, of which the rest is copied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE_VALUES = 2048


def split_heads(x: torch.Tensor, num_heads: int, num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads = x.view(len(x), num_heads + 2 * num_kv_heads, -1)
    return heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads :]


def rotate_and_store(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """As `ops.Ops.rotate_and_store`; the rows of all may lie apart. A token of slot -1 is written nowhere."""
    num_tokens, num_heads, head_dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not num_tokens:
        return out
    num_kv_heads, half = key.shape[1], cos.shape[-1]
    block = triton.next_power_of_2(max(half, head_dim - 2 * half))
    tile_heads = min(max(1, _TILE_VALUES // block), triton.next_power_of_2(num_heads))
    query_parts = triton.cdiv(num_heads, tile_heads)
    _rotate_and_store_kernel[(num_tokens, query_parts + triton.cdiv(num_kv_heads, tile_heads))](
        query,
        key,
        value,
        out,
        cos,
        sin,
        key_cache,
        value_cache,
        slot_mapping,
        num_heads,
        num_kv_heads,
        query_parts,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        cos.stride(0),
        HEAD_DIM=head_dim,
        HALF=half,
        HEADS=tile_heads,
        BLOCK=block,
        num_warps=4,
    )
    return out


@triton.jit
def _rotate_and_store_kernel(
    query,
    key,
    value,
    out,
    cos,
    sin,
    key_cache,
    value_cache,
    slot_mapping,
    num_heads,
    num_kv_heads,
    query_parts,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    angle_stride,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    cosines = tl.load(cos + token * angle_stride + columns, mask=columns < HALF, other=0.0)[None, :]
    sines = tl.load(sin + token * angle_stride + columns, mask=columns < HALF, other=0.0)[None, :]
    if part < query_parts:
        heads = part * HEADS + tl.arange(0, HEADS)
        source = query + token * query_token_stride + heads[:, None] * query_head_stride + columns[None, :]
        places = out + (token * num_heads + heads[:, None]) * HEAD_DIM + columns[None, :]
        _rotate(source, places, cosines, sines, heads < num_heads, HEAD_DIM, HALF, BLOCK)
    else:
        slot = tl.load(slot_mapping + token).to(tl.int64)
        heads = (part - query_parts) * HEADS + tl.arange(0, HEADS)
        kept = heads < tl.where(slot >= 0, num_kv_heads, 0)
        source = key + token * key_token_stride + heads[:, None] * key_head_stride + columns[None, :]
        offsets = (slot * num_kv_heads + heads[:, None]) * HEAD_DIM + columns[None, :]
        _rotate(source, key_cache + offsets, cosines, sines, kept, HEAD_DIM, HALF, BLOCK)
        source = value + token * value_token_stride + heads[:, None] * value_head_stride + columns[None, :]
        for first in tl.static_range(0, HEAD_DIM, BLOCK):
            mask = kept[:, None] & (first + columns < HEAD_DIM)[None, :]
            values = tl.load(source + first, mask=mask, other=0.0)
            tl.store(value_cache + offsets + first, values.to(value_cache.dtype.element_ty), mask=mask)


@triton.jit
def _rotate(source, places, cosines, sines, kept, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of D values at `source` to `places`, which both point to the first BLOCK columns of [HEADS, D]."""
    columns = tl.arange(0, BLOCK)
    mask = kept[:, None] & (columns < HALF)[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    dtype = places.dtype.element_ty
    tl.store(places, (first * cosines - second * sines).to(dtype), mask=mask)
    tl.store(places + HALF, (second * cosines + first * sines).to(dtype), mask=mask)
    if HEAD_DIM > 2 * HALF:
        mask = kept[:, None] & (columns < HEAD_DIM - 2 * HALF)[None, :]
        tl.store(places + 2 * HALF, tl.load(source + 2 * HALF, mask=mask, other=0.0).to(dtype), mask=mask)
