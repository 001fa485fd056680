"""The product of rows with a weight of 4 or 8 bits, a scale (and a minimum) for each group of inputs: W4A16, W8A16.

A word of 32 bits holds codes that lie 16 inputs apart, so that one shift and one mask of a tile of words [O, 16] are 16
neighbouring inputs in their order, which enter `wgmma` as they are: codes are whole numbers of 8 bits, exact in
bfloat16 and float16. The scale of a group multiplies its sum, not its weights: weights are never rounded, and a scale
costs a multiplication for each row and output, not for each weight.

Legend: R rows, O outputs, I inputs, G groups, E experts, B blocks of 16 words (128 inputs of 4 bits, 64 of 8).
"""

from __future__ import annotations

import triton
import triton.language as tl

from pelton.worker.kernels.triton.linear_kernels import add_slices, dot, rows_of_tile, store_rows, tile_of

WORDS = tl.constexpr(16)


@triton.jit(do_not_specialize=["num_rows", "num_row_tiles"])
def packed_product_kernel(
    x_ptr,  # [R, I]
    words_ptr,  # [E, B, O, 16]
    y_ptr,
    bias_ptr,
    scale_ptr,  # [E, G, O]
    minimum_ptr,  # [E, G, O]: what is taken off scale * (code - zero)
    partial_ptr,
    counter_ptr,
    rows_ptr,
    experts_ptr,
    num_rows,
    num_outputs,
    num_inputs,
    num_row_tiles,
    x_stride,
    y_stride,
    num_groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # inputs
    PART: tl.constexpr,  # inputs that share a scale within a block
    HAS_MINIMUM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SHARE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    SLICE: tl.constexpr,  # blocks
    IS_EVEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    WIDEN: tl.constexpr,
):
    NUM_CODES: tl.constexpr = 32 // BITS
    BLOCK_K: tl.constexpr = WORDS * NUM_CODES
    ZERO: tl.constexpr = 1 << (BITS - 1)
    # 2**23 + code, written as the bits of a float32.
    MAGIC: tl.constexpr = 0x4B000000
    num_tiles = num_row_tiles * tl.cdiv(num_outputs, BLOCK_O)
    tile = tl.program_id(0)
    row_tile, output_tile = tile_of(tile, num_row_tiles, tl.cdiv(num_outputs, BLOCK_O), 8)
    rows, row_mask, expert = rows_of_tile(row_tile, rows_ptr, experts_ptr, num_rows, SHARE > 0, BLOCK_R)
    if expert >= 0:
        x_rows = rows if SHARE == 0 else rows // SHARE
        outputs = output_tile * BLOCK_O + tl.arange(0, BLOCK_O)
        w_rows = tl.minimum(outputs, num_outputs - 1)
        num_blocks = tl.cdiv(num_inputs, BLOCK_K)
        num_slices = tl.cdiv(num_blocks, SLICE)
        first_slice, last_slice = 0, num_slices
        if IS_SPLIT:
            first_slice = tl.program_id(1)
            last_slice = first_slice + 1
        lanes = tl.arange(0, WORDS)
        x_ptrs = x_ptr + x_rows.to(tl.int64)[:, None] * x_stride + lanes[None, :]
        words_ptrs = words_ptr + w_rows[:, None] * WORDS + lanes[None, :]
        scale_ptrs = scale_ptr + w_rows
        minimum_ptrs = minimum_ptr + w_rows
        if SHARE > 0:
            words_ptrs += expert.to(tl.int64) * num_blocks * num_outputs * WORDS
            scale_ptrs += expert.to(tl.int64) * num_groups * num_outputs
            minimum_ptrs += expert.to(tl.int64) * num_groups * num_outputs
        total = tl.zeros((BLOCK_O, BLOCK_R), dtype=tl.float32)
        for slice_id in range(first_slice, last_slice):
            part = tl.zeros((BLOCK_O, BLOCK_R), dtype=tl.float32)
            for block in range(slice_id * SLICE, min(slice_id * SLICE + SLICE, num_blocks)):
                words = tl.load(words_ptrs + tl.cast(block, tl.int64) * num_outputs * WORDS)
                for first in tl.static_range(0, BLOCK_K, PART):
                    product = tl.zeros((BLOCK_O, BLOCK_R), dtype=tl.float32)
                    x_sum = tl.zeros((BLOCK_R,), dtype=tl.float32)
                    for k in tl.static_range(first, first + PART, WORDS):
                        codes = (words >> (k // WORDS * BITS)) & ((1 << BITS) - 1)
                        values = (codes | MAGIC).to(tl.float32, bitcast=True) - (8388608.0 + ZERO)
                        in_range = row_mask[:, None]
                        if not IS_EVEN:
                            in_range = in_range & (lanes + (block * BLOCK_K + k) < num_inputs)[None, :]
                        x = tl.load(x_ptrs + block * BLOCK_K + k, mask=in_range, other=0.0)
                        product = dot(values.to(x_ptr.dtype.element_ty), tl.trans(x), product, WIDEN)
                        if HAS_MINIMUM:
                            x_sum += tl.sum(x.to(tl.float32), axis=1)
                    group = min((block * BLOCK_K + first) // GROUP, num_groups - 1)
                    scale = tl.load(scale_ptrs + group * num_outputs).to(tl.float32)
                    part = tl.fma(product, tl.broadcast_to(scale[:, None], product.shape), part)
                    if HAS_MINIMUM:
                        minimum = tl.load(minimum_ptrs + group * num_outputs).to(tl.float32)
                        low = tl.broadcast_to(-minimum[:, None], product.shape)
                        part = tl.fma(low, tl.broadcast_to(x_sum[None, :], product.shape), part)
            total += part
        is_last = True
        if IS_SPLIT:
            is_last, total = add_slices(
                total, row_mask, first_slice, num_slices, tile, num_tiles, partial_ptr, counter_ptr
            )
        if is_last:
            store_rows(total, y_ptr, bias_ptr, rows, outputs, row_mask, num_outputs, y_stride, HAS_BIAS)


@triton.jit
def expand_kernel(
    words_ptr,  # [B, O, 16]
    scale_ptr,  # [G, O]
    minimum_ptr,
    out_ptr,  # [O, I]
    num_outputs,
    num_inputs,
    num_groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Dense weights, for products of many rows by a library."""
    NUM_CODES: tl.constexpr = 32 // BITS
    ZERO: tl.constexpr = 1 << (BITS - 1)
    block = tl.program_id(0)
    outputs = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    lanes = tl.arange(0, WORDS)
    mask = (outputs < num_outputs)[:, None]
    words = tl.load(
        words_ptr + (block.to(tl.int64) * num_outputs + outputs[:, None]) * WORDS + lanes[None, :], mask=mask
    )
    for code in tl.static_range(NUM_CODES):
        inputs = (block * NUM_CODES + code) * WORDS + lanes
        values = ((words >> (code * BITS)) & ((1 << BITS) - 1)).to(tl.float32) - ZERO
        places = tl.minimum(inputs // GROUP, num_groups - 1)[None, :] * num_outputs + outputs[:, None]
        values *= tl.load(scale_ptr + places, mask=mask).to(tl.float32)
        if HAS_MINIMUM:
            values -= tl.load(minimum_ptr + places, mask=mask).to(tl.float32)
        out_places = outputs.to(tl.int64)[:, None] * num_inputs + inputs[None, :]
        tl.store(out_ptr + out_places, values.to(out_ptr.dtype.element_ty), mask=mask & (inputs < num_inputs)[None, :])
