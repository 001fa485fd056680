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
def _store_codes(x, mask, inputs, code_ptr, scale_ptr, size, TO_INT8: tl.constexpr, IN_BLOCKS: tl.constexpr):
    """One row x [BLOCK] in float32, 0 past its end."""
    row = tl.program_id(0).to(tl.int64)
    most: tl.constexpr = INT8_MOST if TO_INT8 else FP8_MOST
    BLOCK: tl.constexpr = x.shape[0]
    if IN_BLOCKS:
        NUM_BLOCKS: tl.constexpr = BLOCK // SCALE_BLOCK
        x = tl.reshape(x, (NUM_BLOCKS, SCALE_BLOCK))
        scale = tl.max(tl.abs(x), axis=1) / most
        inverse = tl.where(scale > 0.0, 1.0 / scale, 0.0)
        values = tl.reshape(x * inverse[:, None], (BLOCK,))
        blocks = tl.arange(0, NUM_BLOCKS)
        num_blocks = tl.cdiv(size, SCALE_BLOCK)
        tl.store(scale_ptr + row * num_blocks + blocks, scale, mask=blocks < num_blocks)
    else:
        scale = tl.max(tl.abs(x), axis=0) / most
        values = x * tl.where(scale > 0.0, 1.0 / scale, 0.0)
        tl.store(scale_ptr + row, scale)
    _round_to(values, code_ptr, row * size + inputs, mask, TO_INT8)


@triton.jit
def quantize_rows_kernel(
    x_ptr, code_ptr, scale_ptr, size, stride, TO_INT8: tl.constexpr, IN_BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    inputs = tl.arange(0, BLOCK)
    mask = inputs < size
    x = tl.load(x_ptr + tl.program_id(0).to(tl.int64) * stride + inputs, mask=mask, other=0.0).to(tl.float32)
    _store_codes(x, mask, inputs, code_ptr, scale_ptr, size, TO_INT8, IN_BLOCKS)


@triton.jit
def norm_quantize_kernel(
    x_ptr,
    residual_ptr,  # x + residual is written over it
    weight_ptr,
    code_ptr,
    scale_ptr,
    size,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    TO_INT8: tl.constexpr,
    IN_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """RMSNorm of x (+ residual), rounded on the way: the normed row is never written."""
    inputs = tl.arange(0, BLOCK)
    mask = inputs < size
    places = tl.program_id(0).to(tl.int64) * size + inputs
    x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + places, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + places, rounded, mask=mask)
        x = rounded.to(tl.float32)
    x = x * (1.0 / tl.sqrt(tl.sum(x * x, axis=0) / size + eps))
    x *= tl.load(weight_ptr + inputs, mask=mask, other=0.0)
    _store_codes(
        x.to(x_ptr.dtype.element_ty).to(tl.float32), mask, inputs, code_ptr, scale_ptr, size, TO_INT8, IN_BLOCKS
    )


def quantize_rows(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x [R, I] as codes [R, I] and float32 scales: [R], or [R, ceil(I / 128)] for fp8_block."""
    codes, scales = _outputs(x, kind)
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
        )
    return codes, scales


def norm_quantize(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows(rms_norm(x + residual))` in one pass; the sum is written over `residual`."""
    codes, scales = _outputs(x, kind)
    if len(x):
        block = _block(x.shape[1])
        norm_quantize_kernel[(len(x),)](
            x,
            x if residual is None else residual,
            weight,
            codes,
            scales,
            x.shape[1],
            eps,
            residual is not None,
            kind == "int8",
            kind == "fp8_block",
            block,
            num_warps=_warps(block),
        )
    return codes, scales


def _outputs(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(x.shape, dtype=torch.int8 if kind == "int8" else torch.float8_e4m3fn, device=x.device)
    shape = (len(x), -(-x.shape[1] // 128)) if kind == "fp8_block" else (len(x),)
    return codes, torch.empty(shape, dtype=torch.float32, device=x.device)


def _block(size: int) -> int:
    return max(triton.next_power_of_2(size), 128)


def _warps(block: int) -> int:
    """At most 64 values for a thread: a row stays in registers between its two passes."""
    return min(max(block // 2048, 4), 16)
