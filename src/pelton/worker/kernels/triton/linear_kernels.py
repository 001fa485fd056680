"""The product y = x W^T of rows with a weight in floats, int8 or float8, plain or grouped by expert.

Legend: R rows, O outputs, I inputs, E experts. `tiles.py` says how sums are cut, and why.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pelton.worker.kernels.triton.interpreter import mend_interpreter

mend_interpreter()
# What a weight [O, I] is; constants of the kernels.
FLOAT = tl.constexpr(0)
INT8 = tl.constexpr(1)  # scales [O] of the weight and [R] of the rows
FP8 = tl.constexpr(2)  # the same
FP8_BLOCK = tl.constexpr(3)  # scales [O / 128, I / 128] and [R, I / 128]
SCALE_BLOCK = tl.constexpr(128)


@triton.jit
def dot(w, x, total, WIDEN: tl.constexpr):
    """total + w x. The interpreter has no arithmetic on bfloat16: there it is widened first, without loss."""
    if WIDEN:
        w, x = w.to(tl.float32), x.to(tl.float32)
    return tl.dot(w, x, total, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def rows_of_tile(row_tile, rows_ptr, experts_ptr, num_rows, GROUPED: tl.constexpr, BLOCK_R: tl.constexpr):
    """(rows of y [BLOCK_R], which of them exist, their expert: -1 where the tile has none)."""
    rows = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    if GROUPED:
        rows = tl.load(rows_ptr + rows)
        expert = tl.load(experts_ptr + row_tile)
    else:
        expert = 0
    return rows, rows < num_rows, expert


@triton.jit
def add_slices(total, row_mask, slice_id, num_slices, tile, num_tiles, partial_ptr, counter_ptr):
    """Whether this program is the last of its tile, and then the sum of all slices, in their order.

    Who is last is a matter of chance, and so it adds up its own slice from memory like the others.
    """
    num_outputs: tl.constexpr = total.shape[0]
    num_rows: tl.constexpr = total.shape[1]
    size: tl.constexpr = num_outputs * num_rows
    # Row by row, so that rows which are not there cost nothing.
    places = tl.arange(0, num_outputs)[:, None] + tl.arange(0, num_rows)[None, :] * num_outputs
    tl.store(partial_ptr + (slice_id * num_tiles + tile) * size + places, total, mask=row_mask[None, :])
    tl.debug_barrier()  # all of this program's stores, before one of its threads says so
    is_last = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == num_slices - 1
    if is_last:
        total = tl.zeros_like(total)
        for other in range(num_slices):
            found = partial_ptr + (other * num_tiles + tile) * size + places
            total += tl.load(found, mask=row_mask[None, :], other=0, cache_modifier=".cg")
        tl.store(counter_ptr + tile, 0)
    return is_last, total


@triton.jit
def store_rows(total, y_ptr, bias_ptr, rows, outputs, row_mask, num_outputs, y_stride, HAS_BIAS: tl.constexpr):
    """total [BLOCK_O, BLOCK_R] plus the bias into rows of y."""
    if HAS_BIAS:
        total += tl.load(bias_ptr + outputs, mask=outputs < num_outputs, other=0.0).to(tl.float32)[:, None]
    places = rows.to(tl.int64)[None, :] * y_stride + outputs[:, None]
    mask = row_mask[None, :] & (outputs < num_outputs)[:, None]
    tl.store(y_ptr + places, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def tile_of(program, num_row_tiles, num_output_tiles, GROUP: tl.constexpr):
    """(row tile, output tile): programs that run together share rows and outputs in the L2 cache."""
    in_group = GROUP * num_output_tiles
    first = program // in_group * GROUP
    size = min(num_row_tiles - first, GROUP)
    return first + program % in_group % size, program % in_group // size


@triton.jit(do_not_specialize=["num_rows", "num_row_tiles"])
def product_kernel(
    x_ptr,  # [R, I]
    w_ptr,  # [E, O, I]
    y_ptr,
    bias_ptr,
    x_scale_ptr,
    w_scale_ptr,
    partial_ptr,  # [slices, tiles, BLOCK_R, BLOCK_O]
    counter_ptr,  # [tiles] of 0
    rows_ptr,  # grouped: the row of y for each place of the row tiles
    experts_ptr,  # grouped: [row tiles]
    num_rows,
    num_outputs,
    num_inputs,
    num_row_tiles,
    x_stride,
    y_stride,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SHARE: tl.constexpr,  # 0: not grouped; else rows of y for a row of x
    IS_SPLIT: tl.constexpr,  # slices to programs of their own (axis 1 of the grid)
    SLICE: tl.constexpr,
    IS_EVEN: tl.constexpr,  # I is a multiple of BLOCK_K
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    num_tiles = num_row_tiles * tl.cdiv(num_outputs, BLOCK_O)
    tile = tl.program_id(0)
    row_tile, output_tile = tile_of(tile, num_row_tiles, tl.cdiv(num_outputs, BLOCK_O), 8)
    rows, row_mask, expert = rows_of_tile(row_tile, rows_ptr, experts_ptr, num_rows, SHARE > 0, BLOCK_R)
    if expert >= 0:
        x_rows = rows if SHARE == 0 else rows // SHARE
        outputs = output_tile * BLOCK_O + tl.arange(0, BLOCK_O)
        # Outputs past the end read the last one and are not stored: their loads need no mask.
        w_rows = (
            expert.to(tl.int64) * num_outputs + tl.minimum(outputs, num_outputs - 1)
            if SHARE > 0
            else (tl.minimum(outputs, num_outputs - 1).to(tl.int64))
        )
        num_slices = tl.cdiv(num_inputs, SLICE)
        first_slice, last_slice = 0, num_slices
        if IS_SPLIT:
            first_slice = tl.program_id(1)
            last_slice = first_slice + 1
        inputs = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + x_rows.to(tl.int64)[:, None] * x_stride + inputs[None, :]
        w_ptrs = w_ptr + w_rows[:, None] * num_inputs + inputs[None, :]
        num_scales = tl.cdiv(num_inputs, SCALE_BLOCK)
        sum_type: tl.constexpr = tl.int32 if KIND == INT8 else tl.float32
        total = tl.zeros((BLOCK_O, BLOCK_R), dtype=sum_type)
        for slice_id in range(first_slice, last_slice):
            part = tl.zeros((BLOCK_O, BLOCK_R), dtype=sum_type)
            for k in range(slice_id * SLICE, min(slice_id * SLICE + SLICE, num_inputs), BLOCK_K):
                if IS_EVEN:
                    x = tl.load(x_ptrs + k, mask=row_mask[:, None], other=0.0)
                    w = tl.load(w_ptrs + k)
                else:
                    in_range = (k + inputs < num_inputs)[None, :]
                    x = tl.load(x_ptrs + k, mask=row_mask[:, None] & in_range, other=0.0)
                    w = tl.load(w_ptrs + k, mask=in_range, other=0.0)
                if KIND == INT8:
                    part = tl.dot(w, tl.trans(x), part, out_dtype=tl.int32)
                elif KIND == FP8:
                    # Hopper's float8 sums keep 14 bits: they go to float32 after every 128 inputs.
                    part = tl.dot(w, tl.trans(x), part, max_num_imprecise_acc=BLOCK_K, out_dtype=tl.float32)
                elif KIND == FP8_BLOCK:
                    product = tl.dot(w, tl.trans(x), out_dtype=tl.float32)
                    block = k // SCALE_BLOCK
                    x_scale = tl.load(x_scale_ptr + x_rows * num_scales + block, mask=row_mask, other=0.0)
                    # A matrix of an expert starts a block of its own.
                    scale_rows = tl.minimum(outputs, num_outputs - 1) // SCALE_BLOCK
                    scale_rows += expert * tl.cdiv(num_outputs, SCALE_BLOCK)
                    w_scale = tl.load(w_scale_ptr + scale_rows * num_scales + block)
                    part = tl.fma(product, w_scale[:, None] * x_scale[None, :], part)
                else:
                    part = dot(w, tl.trans(x), part, WIDEN)
            total += part
        is_last = True
        if IS_SPLIT:
            is_last, total = add_slices(
                total, row_mask, first_slice, num_slices, tile, num_tiles, partial_ptr, counter_ptr
            )
        if is_last:
            result = total.to(tl.float32)
            if (KIND == INT8) | (KIND == FP8):
                x_scale = tl.load(x_scale_ptr + x_rows, mask=row_mask, other=0.0)
                result = result * tl.load(w_scale_ptr + w_rows)[:, None] * x_scale[None, :]
            store_rows(result, y_ptr, bias_ptr, rows, outputs, row_mask, num_outputs, y_stride, HAS_BIAS)
