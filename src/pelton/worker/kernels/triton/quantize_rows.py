"""Rows of activations rounded to 8 bits as they are: int8 or float8, with a scale per row or per 128 of its inputs.

Legend: R rows, I inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pelton.worker.kernels.triton.linear_kernels import SCALE_BLOCK

INT8_MOST = tl.constexpr(127.0)
FP8_MOST = tl.constexpr(448.0)  # of e4m3
# 1.5 * 2**23: adding it and taking it off rounds to a whole number, to even on a tie.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def _round_to(values, code_ptr, places, mask, TO_INT8: tl.constexpr):
    if TO_INT8:
        codes = ((values + _ROUND) - _ROUND).to(tl.int8)
    else:
        codes = tl.clamp(values, -FP8_MOST, FP8_MOST).to(tl.float8e4nv)
    tl.store(code_ptr + places, codes, mask=mask)


@triton.jit
def store_codes(x, rows, mask, code_ptr, scale_ptr, size, TO_INT8: tl.constexpr, IN_BLOCKS: tl.constexpr):
    """Rows x [ROWS, BLOCK] in float32, 0 where `mask` is not. A maximum has no order, and launches without fusion round
    alike: every kernel makes the same codes of a row."""
    most: tl.constexpr = INT8_MOST if TO_INT8 else FP8_MOST
    ROWS: tl.constexpr = x.shape[0]
    BLOCK: tl.constexpr = x.shape[1]
    inputs = tl.arange(0, BLOCK)
    is_row = tl.max(mask.to(tl.int32), axis=1) > 0
    if IN_BLOCKS:
        NUM_BLOCKS: tl.constexpr = BLOCK // SCALE_BLOCK
        x = tl.reshape(x, (ROWS, NUM_BLOCKS, SCALE_BLOCK))
        scale = tl.max(tl.abs(x), axis=2) / most
        inverse = tl.where(scale > 0.0, 1.0 / scale, 0.0)
        values = tl.reshape(x * inverse[:, :, None], (ROWS, BLOCK))
        blocks = tl.arange(0, NUM_BLOCKS)
        num_blocks = tl.cdiv(size, SCALE_BLOCK)
        scale_mask = is_row[:, None] & (blocks < num_blocks)[None, :]
        tl.store(scale_ptr + rows[:, None] * num_blocks + blocks[None, :], scale, mask=scale_mask)
    else:
        scale = tl.max(tl.abs(x), axis=1) / most
        values = x * tl.where(scale > 0.0, 1.0 / scale, 0.0)[:, None]
        tl.store(scale_ptr + rows, scale, mask=is_row)
    _round_to(values, code_ptr, rows[:, None] * size + inputs[None, :], mask, TO_INT8)


@triton.jit
def quantize_rows_kernel(
    x_ptr, code_ptr, scale_ptr, size, stride, TO_INT8: tl.constexpr, IN_BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    inputs = tl.arange(0, BLOCK)
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    mask = (inputs < size)[None, :] & (rows >= 0)[:, None]
    x = tl.load(x_ptr + rows[:, None] * stride + inputs[None, :], mask=mask, other=0.0).to(tl.float32)
    store_codes(x, rows, mask, code_ptr, scale_ptr, size, TO_INT8, IN_BLOCKS)


def quantize_rows(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x [R, I] as codes [R, I] and float32 scales: [R], or [R, ceil(I / 128)] for fp8_block."""
    codes, scales = empty_codes(x, kind)
    if len(x):
        block = _block(x.shape[1])
        quantize_rows_kernel[(len(x),)](
            x,
            codes,
            scales,
            x.shape[1],
            x.stride(0),
            kind == "int8",
            kind == "fp8_block",
            block,
            num_warps=_warps(block),
            enable_fp_fusion=False,
        )
    return codes, scales


def empty_codes(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for what `quantize_rows` makes of x."""
    codes = torch.empty(x.shape, dtype=torch.int8 if kind == "int8" else torch.float8_e4m3fn, device=x.device)
    shape = (len(x), -(-x.shape[1] // 128)) if kind == "fp8_block" else (len(x),)
    return codes, torch.empty(shape, dtype=torch.float32, device=x.device)


def _block(size: int) -> int:
    return max(triton.next_power_of_2(size), 128)


def _warps(block: int) -> int:
    """At most 64 values for a thread: a row stays in registers between its two passes."""
    return min(max(block // 2048, 4), 16)
