"""Paged attention in Triton: one kernel for decodes, prefills and shared prefixes, and one that merges parts.

The items of a plan are its programs (attention_plan.py). Within a chunk: online softmax (Milakov and Gimelshein,
arXiv:1805.02867) over tiles of positions, in order; exponents are of two. Multiplications and additions are fused
where `tl.fma` says so and nowhere else (kernels are launched with `enable_fp_fusion=False`), so that both kernels
merge chunks with the same roundings.

Legend: M rows of a tile (tokens times the query heads of a key-value head), P positions of a tile, D head size
rounded up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pelton.worker.kernels.triton import attention_plan
from pelton.worker.kernels.triton.interpreter import mend_interpreter
from pelton.worker.kernels.triton.kv_tiles import DENSE, INT4, load_codes, load_scales

mend_interpreter()

_RESULT = tl.constexpr(attention_plan.RESULT)
_EACH = tl.constexpr(attention_plan.EACH)
_ITEM_WORDS = tl.constexpr(attention_plan.ITEM_WORDS)
_MERGE_WORDS = tl.constexpr(attention_plan.MERGE_WORDS)


@triton.jit
def fold(total, total_max, total_weight, part, part_max, part_weight):
    """(sum [M, D], maximum [M], weight [M]) of two sets of positions from those of each. Nothing and a part are
    that part, bit for bit, and a part and nothing are the part too."""
    new_max = tl.maximum(total_max, part_max)
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    old = tl.exp2(total_max - base)
    new = tl.exp2(part_max - base)
    total = tl.fma(part, tl.broadcast_to(new[:, None], part.shape), total * old[:, None])
    return total, new_max, tl.fma(part_weight, new, total_weight * old)


@triton.jit
def _cap(x, cap):
    """cap * tanh of half of x, which is in bits: 2 / ln 2 times the argument."""
    power = tl.exp2(-tl.abs(x))
    capped = cap * ((1.0 - power) / (1.0 + power))
    return tl.where(x < 0, -capped, capped)


@triton.jit
def _visible(position, places, WINDOW: tl.constexpr):
    """Whether rows at `position` [M] see `places` [P]."""
    visible = places[None, :] <= position[:, None]
    if WINDOW > 0:
        visible = visible & (places[None, :] > position[:, None] - WINDOW)
    return visible


@triton.jit
def _store_part(sums, stats, row, is_row, part, part_max, part_weight, HEAD_DIM: tl.constexpr):
    """Partial results [M, D] to `row` [M] of sums [., HEAD_DIM] and stats [., 2]."""
    dim = tl.arange(0, part.shape[1])
    tl.store(sums + row[:, None] * HEAD_DIM + dim[None, :], part, mask=is_row[:, None] & (dim[None, :] < HEAD_DIM))
    tl.store(stats + row * 2, part_max, mask=is_row)
    tl.store(stats + row * 2 + 1, part_weight, mask=is_row)


@triton.jit
def attention_kernel(
    query,  # [T, N, D]
    key_cache,
    value_cache,
    key_scales,  # the caches' bytes as scales; unused where there are none
    value_scales,
    out,  # [T, N * D]
    part_sums,  # [slots, N, D] float32
    part_stats,  # [slots, N, 2] float32: maximum, weight
    items,
    tile_tokens,
    positions,
    slots,
    tables,
    scale,  # of scores, for exponents of two; with SOFTCAP: of the argument of _cap
    softcap,
    QUERY_STRIDE: tl.constexpr,
    QUERY_HEAD_STRIDE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    FORMAT: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRODUCT: tl.constexpr,  # type that products take
    VALUE_PRODUCT: tl.constexpr,  # the same for that of weights and values
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: items, key-value heads."""
    item = items + tl.program_id(0) * _ITEM_WORDS
    kv_head = tl.program_id(1)
    num_tokens = tl.load(item + 1)
    if num_tokens == 0:
        return
    table = tables + tl.load(item + 2)
    first_chunk = tl.load(item + 3)
    end_chunk = tl.load(item + 4)
    mode = tl.load(item + 5)

    index = tl.arange(0, ROWS) // GROUP
    is_row = index < num_tokens
    token = tl.load(tile_tokens + tl.load(item) + index, mask=is_row, other=0)
    # A row without a token sees nothing.
    position = tl.load(positions + token, mask=is_row, other=-1)
    slot = tl.load(slots + token, mask=is_row, other=0)
    head = kv_head * GROUP + tl.arange(0, ROWS) % GROUP
    token = token.to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    row_mask = is_row[:, None] & (dim[None, :] < HEAD_DIM)
    rows = tl.load(
        query + token[:, None] * QUERY_STRIDE + head[:, None] * QUERY_HEAD_STRIDE + dim[None, :],
        mask=row_mask,
        other=0.0,
    ).to(PRODUCT)

    # Positions that some row sees: no other is read.
    low = first_chunk * CHUNK
    if WINDOW > 0:
        low = tl.maximum(low, tl.min(tl.where(is_row, position, 2147483647)) - WINDOW + 1)
    end = tl.minimum(end_chunk * CHUNK, tl.max(position) + 1)

    total = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    total_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total_weight = tl.zeros([ROWS], dtype=tl.float32)
    part = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    part_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    part_weight = tl.zeros([ROWS], dtype=tl.float32)
    for start in tl.range(low // TILE * TILE, end, TILE, num_stages=STAGES):
        place = start + tl.arange(0, TILE)
        is_read = (place >= low) & (place < end)
        block = tl.load(table + place // BLOCK_SIZE, mask=is_read, other=0).to(tl.int64)
        offset = place % BLOCK_SIZE
        at = block * BLOCK_STRIDE + offset * SLOT_STRIDE + kv_head * HEAD_STRIDE
        scale_at = block * (BLOCK_STRIDE // 4) + offset * NUM_KV_HEADS + kv_head

        keys = load_codes(key_cache + at, is_read, FORMAT, HEAD_DIM, BLOCK_D, PRODUCT)
        scores = tl.dot(rows, tl.trans(keys), input_precision=PRECISION)
        if FORMAT != DENSE:
            factor, offset_of_key = load_scales(key_scales, scale_at, is_read, FORMAT)
            scores = scores * factor[None, :]
            if FORMAT == INT4:
                scores = tl.fma(
                    tl.broadcast_to(tl.sum(rows.to(tl.float32), 1)[:, None], scores.shape),
                    tl.broadcast_to(offset_of_key[None, :], scores.shape),
                    scores,
                )
        scores = scores * scale
        if SOFTCAP:
            scores = _cap(scores, softcap)
        scores = tl.where(_visible(position, place, WINDOW), scores, float("-inf"))

        new_max = tl.maximum(part_max, tl.max(scores, 1))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - base[:, None])
        old = tl.exp2(part_max - base)
        part_weight = tl.fma(part_weight, old, tl.sum(weights, 1))
        part = part * old[:, None]
        part_max = new_max
        values = load_codes(value_cache + at, is_read, FORMAT, HEAD_DIM, BLOCK_D, VALUE_PRODUCT)
        if FORMAT != DENSE:
            factor, offset_of_value = load_scales(value_scales, scale_at, is_read, FORMAT)
            if FORMAT == INT4:
                part += tl.sum(weights * offset_of_value[None, :], 1)[:, None]
            weights = weights * factor[None, :]
        part = tl.dot(weights.to(VALUE_PRODUCT), values, part, input_precision=PRECISION)

        if ((start + TILE) % CHUNK == 0) | (start + TILE >= end):
            if mode == _EACH:
                row = (slot + start // CHUNK).to(tl.int64) * (NUM_KV_HEADS * GROUP) + head
                _store_part(part_sums, part_stats, row, is_row, part, part_max, part_weight, HEAD_DIM)
            else:
                total, total_max, total_weight = fold(total, total_max, total_weight, part, part_max, part_weight)
            part = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
            part_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
            part_weight = tl.zeros([ROWS], dtype=tl.float32)

    if mode == _RESULT:
        result = total / tl.where(is_row, total_weight, 1.0)[:, None]
        to = out + token[:, None] * (NUM_KV_HEADS * GROUP * HEAD_DIM) + head[:, None] * HEAD_DIM + dim[None, :]
        tl.store(to, result.to(out.dtype.element_ty), mask=row_mask)
    elif mode != _EACH:
        row = (slot + end_chunk - 1).to(tl.int64) * (NUM_KV_HEADS * GROUP) + head
        _store_part(part_sums, part_stats, row, is_row, total, total_max, total_weight, HEAD_DIM)


@triton.jit
def merge_kernel(
    out,  # [T, N * D]
    part_sums,
    part_stats,
    merges,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A token's partial results, in order. Grid: merges, query heads."""
    merge = merges + tl.program_id(0) * _MERGE_WORDS
    head = tl.program_id(1)
    num_slots = tl.load(merge + 2)
    if num_slots == 0:
        return
    token = tl.load(merge).to(tl.int64)
    first = tl.load(merge + 1).to(tl.int64) * NUM_HEADS + head
    dim = tl.arange(0, BLOCK_D)[None, :]
    one = tl.arange(0, 1)

    total = tl.zeros([1, BLOCK_D], dtype=tl.float32)
    total_max = tl.full([1], float("-inf"), dtype=tl.float32)
    total_weight = tl.zeros([1], dtype=tl.float32)
    for index in tl.range(0, num_slots, num_stages=4):
        row = first + index * NUM_HEADS
        part = tl.load(part_sums + row * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
        part_max = tl.load(part_stats + row * 2 + one)
        part_weight = tl.load(part_stats + row * 2 + 1 + one)
        total, total_max, total_weight = fold(total, total_max, total_weight, part, part_max, part_weight)
    result = total / total_weight[:, None]
    tl.store(out + (token * NUM_HEADS + head) * HEAD_DIM + dim, result.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
