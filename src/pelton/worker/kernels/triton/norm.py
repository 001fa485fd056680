"""RMSNorm, Zhang and Sennrich, arXiv:1910.07467, alone and with the residual added first.

Law 3: a row is one program's, or one line of a program's tile; the tile's shape depends on the width alone, so a row
is summed in one order whatever the number of rows, by one compiled kernel: none is made for numbers of rows that
are a multiple of 16.

Legend: T tokens, N heads (1 where x has two axes), H width of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pelton.worker.kernels.triton.quantize_rows import empty_codes, store_codes

_TILE_VALUES = 2048


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, H] or [T, N, H], whose last axis is contiguous; weight float32 [H]. The result is contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, out, None, eps)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual); the sum, rounded to x's dtype, replaces the residual."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, residual, weight, out, residual, eps)
    return out, residual


def add_rms_norm_rounded(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, kind: str
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """As `add_rms_norm`, and `quantize_rows` of the normed rows, to the bit, in the same pass."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    codes = empty_codes(x, kind)
    _launch(x, residual, weight, out, residual, eps, (kind, *codes))
    return out, codes


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor | None,
    eps: float,
    rounded: tuple[str, torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """`rounded`: kind, codes and scales, for rows of 128 or more."""
    width = x.shape[-1]
    num_heads = x.shape[1] if x.ndim == 3 else 1
    num_rows = x.shape[0] * num_heads
    if not num_rows:
        return
    if x.stride(-1) != 1 or (residual is not None and not (x.is_contiguous() and residual.is_contiguous())):
        raise ValueError("rows must be contiguous, and so must all of x where a residual is added")
    block = triton.next_power_of_2(width)
    tile_rows = max(1, _TILE_VALUES // block)
    _rms_norm_kernel[(triton.cdiv(num_rows, tile_rows),)](
        x,
        residual,
        weight,
        out,
        total,
        num_rows,
        width,
        num_heads,
        x.stride(0),
        x.stride(1) if x.ndim == 3 else 0,
        eps,
        out if rounded is None else rounded[1],
        out if rounded is None else rounded[2],
        ROUNDS=rounded is not None,
        TO_INT8=rounded is not None and rounded[0] == "int8",
        IN_BLOCKS=rounded is not None and rounded[0] == "fp8_block",
        HAS_RESIDUAL=residual is not None,
        ROWS=tile_rows,
        BLOCK=block,
        num_warps=min(max(block * tile_rows // 512, 1), 8),
        enable_fp_fusion=False,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    total,
    num_rows,
    width,
    num_heads,
    token_stride,
    head_stride,
    eps,
    code_ptr,
    scale_ptr,
    ROUNDS: tl.constexpr,
    TO_INT8: tl.constexpr,
    IN_BLOCKS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < width)[None, :]
    starts = (rows // num_heads).to(tl.int64) * token_stride + (rows % num_heads) * head_stride
    values = tl.load(x + starts[:, None] + columns[None, :], mask=mask, other=0.0)
    places = rows.to(tl.int64)[:, None] * width + columns[None, :]
    if HAS_RESIDUAL:
        added = tl.load(residual + places, mask=mask, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(values.dtype)
        tl.store(total + places, values, mask=mask)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)
    factors = tl.load(weight + columns, mask=columns < width, other=0.0)
    result = wide * scale[:, None] * factors[None, :]
    normed = result.to(out.dtype.element_ty)
    tl.store(out + places, normed, mask=mask)
    if ROUNDS:
        values = tl.where(mask, normed.to(tl.float32), 0.0)
        store_codes(values, rows.to(tl.int64), mask, code_ptr, scale_ptr, width, TO_INT8, IN_BLOCKS)
