"""Rotary embedding and the write of keys and values into a packed cache (worker/kv_format.py), in one kernel.

fp8 and int8: a head's values over its largest magnitude. int4: between a head's least and greatest value, keys
turned by a Hadamard matrix before, and queries with them, which leaves products what they are: a few dimensions of
keys are far larger than the rest in all tokens (Liu et al., KIVI, arXiv:2402.02750), and the turn shares them out
among all (Ashkboos et al., QuaRot, arXiv:2404.00456). Head sizes that are no power of two go without it.

Legend: T tokens, N query heads, K key-value heads, D head size rounded up to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pelton.worker.kernels.triton.attention_config import padded_head_dim
from pelton.worker.kernels.triton.kv_tiles import FP8, INT4, codes_and_scales, format_number, format_of
from pelton.worker.kv_format import SCALE_BYTES, KVFormat


def rotate_and_store_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """As `ops.Ops.rotate_and_store` for packed caches. A token of slot -1 is written nowhere.

    The query that is returned is for attention over these caches alone: it may be turned as their keys are.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, kv_format = key.shape[1], format_of(key_cache)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not num_tokens:
        return out
    block_size = packed_block_size(kv_format, key_cache.shape[1], num_kv_heads, head_dim)
    codes_bytes = kv_format.codes_bytes(block_size, num_kv_heads, head_dim)
    turns = kv_format.name == "int4" and head_dim == padded_head_dim(head_dim)
    _rotate_and_store_kernel[(num_tokens, num_heads + num_kv_heads)](
        query,
        key,
        value,
        out,
        cos,
        sin,
        *codes_and_scales(key_cache, codes_bytes),
        *codes_and_scales(value_cache, codes_bytes),
        slot_mapping,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        cos.stride(0),
        BLOCK_STRIDE=key_cache.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HALF=cos.shape[-1],
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_SIZE=block_size,
        FORMAT=format_number(kv_format),
        NUM_TURNS=head_dim.bit_length() - 1 if turns else 0,
        NORM=head_dim**-0.5,
        num_warps=1,
    )
    return out


def packed_block_size(kv_format: KVFormat, block_bytes: int, num_kv_heads: int, head_dim: int) -> int:
    """Positions of a block of `block_bytes` for keys or values of one layer. Raises `ValueError` where it is none."""
    block_size = block_bytes // (num_kv_heads * (head_dim * kv_format.element_bits // 8 + SCALE_BYTES))
    if kv_format.block_shape(block_size, num_kv_heads, head_dim) != (block_bytes,):
        raise ValueError(f"{block_bytes} bytes are no block of {num_kv_heads} heads of {head_dim} as {kv_format.name}")
    return block_size


@triton.jit
def _rotated(source, cos, sin, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr):
    """The head at `source` in float32 [D], its first 2 * HALF dimensions rotated."""
    dim = tl.arange(0, BLOCK_D)
    x = tl.load(source + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
    turns = dim < 2 * HALF
    pair = tl.where(dim < HALF, dim, dim - HALF)
    partner = tl.load(source + tl.where(dim < HALF, dim + HALF, dim - HALF), mask=turns, other=0.0).to(tl.float32)
    cosine = tl.load(cos + pair, mask=turns, other=1.0)
    sine = tl.load(sin + pair, mask=turns, other=0.0)
    return x * cosine + tl.where(dim < HALF, -partner, partner) * sine


@triton.jit
def _spread(x, SIZE: tl.constexpr, NUM_TURNS: tl.constexpr, NORM: tl.constexpr):
    """x [SIZE] times a Hadamard matrix, its rows in an order of their own; as it is if NUM_TURNS is 0."""
    for _ in tl.static_range(NUM_TURNS):
        first, second = tl.split(tl.reshape(x, [SIZE // 2, 2]))
        x = tl.reshape(tl.trans(tl.join(first + second, first - second)), [SIZE])
    if NUM_TURNS > 0:
        x = x * NORM
    return x


@triton.jit
def _store_packed(
    x, codes, scales, row, scale_row, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """x [D] to codes + row, with its scale at number `scale_row`."""
    dim = tl.arange(0, BLOCK_D)
    if FORMAT == INT4:
        least = tl.min(tl.where(dim < HEAD_DIM, x, float("inf")), 0)
        most = tl.max(tl.where(dim < HEAD_DIM, x, float("-inf")), 0)
        # As they are read, and wide enough for all values after rounding.
        minimum = tl.maximum(least, -65504.0).to(tl.float16)
        step = tl.minimum((most - minimum.to(tl.float32)) * (1.001 / 15), 65504.0).to(tl.float16)
        wide = step.to(tl.float32)
        code = tl.floor((x - minimum.to(tl.float32)) / tl.where(wide > 0, wide, 1.0) + 0.5)
        code = tl.minimum(tl.maximum(code, 0.0), 15.0).to(tl.int32)
        first, second = tl.split(tl.reshape(code, [BLOCK_D // 2, 2]))
        byte = tl.arange(0, BLOCK_D // 2)
        tl.store(codes + row + byte, (first | (second << 4)).to(tl.uint8), mask=byte < HEAD_DIM // 2)
        tl.store(scales + 2 * scale_row, step)
        tl.store(scales + 2 * scale_row + 1, minimum)
    else:
        largest = tl.max(tl.abs(x), 0)
        most = 448.0 if FORMAT == FP8 else 127.0
        values = x * tl.where(largest > 0, most / tl.where(largest > 0, largest, 1.0), 0.0)
        values = tl.minimum(tl.maximum(values, -most), most)
        if FORMAT == FP8:
            code = values.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            code = tl.floor(values + 0.5).to(tl.int8).to(tl.uint8, bitcast=True)
        tl.store(codes + row + dim, code, mask=dim < HEAD_DIM)
        tl.store(scales + scale_row, largest / most)


@triton.jit
def _rotate_and_store_kernel(
    query,
    key,
    value,
    out,
    cos,
    sin,
    key_codes,
    key_scales,
    value_codes,
    value_scales,
    slot_mapping,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    angle_stride,
    BLOCK_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FORMAT: tl.constexpr,
    NUM_TURNS: tl.constexpr,
    NORM: tl.constexpr,
):
    """Grid: tokens, query heads and then key-value heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    cos += token * angle_stride
    sin += token * angle_stride
    dim = tl.arange(0, BLOCK_D)
    if head < NUM_HEADS:
        x = _rotated(query + token * query_token_stride + head * query_head_stride, cos, sin, HEAD_DIM, HALF, BLOCK_D)
        x = _spread(x, BLOCK_D, NUM_TURNS, NORM)
        to = out + (token * NUM_HEADS + head) * HEAD_DIM + dim
        tl.store(to, x.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
    else:
        kv_head = head - NUM_HEADS
        slot = tl.load(slot_mapping + token).to(tl.int64)
        if slot >= 0:
            block = slot // BLOCK_SIZE
            offset = slot % BLOCK_SIZE
            head_bytes = HEAD_DIM // 2 if FORMAT == INT4 else HEAD_DIM
            row = block * BLOCK_STRIDE + (offset * NUM_KV_HEADS + kv_head) * head_bytes
            scale_row = block * (BLOCK_STRIDE // 4) + offset * NUM_KV_HEADS + kv_head
            x = _rotated(key + token * key_token_stride + kv_head * key_head_stride, cos, sin, HEAD_DIM, HALF, BLOCK_D)
            x = _spread(x, BLOCK_D, NUM_TURNS, NORM)
            _store_packed(x, key_codes, key_scales, row, scale_row, FORMAT, HEAD_DIM, BLOCK_D)
            at = value + token * value_token_stride + kv_head * value_head_stride + dim
            x = tl.load(at, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
            _store_packed(x, value_codes, value_scales, row, scale_row, FORMAT, HEAD_DIM, BLOCK_D)
