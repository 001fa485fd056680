"""Activations, in float32 whatever the type of the tensors. Legend: T tokens, F intermediate size."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    return _gated(gate_up, False)


def gelu_tanh_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), Hendrycks and Gimpel, arXiv:1606.08415."""
    return _gated(gate_up, True)


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Float32, whatever x is."""
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    x = x.contiguous()
    if x.numel():
        _softcap_kernel[(triton.cdiv(x.numel(), _BLOCK),)](x, out, x.numel(), cap, BLOCK=_BLOCK, num_warps=4)
    return out


def _gated(gate_up: torch.Tensor, gelu: bool) -> torch.Tensor:
    num_rows, double = gate_up.shape
    width = double // 2
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        block = min(_BLOCK, triton.next_power_of_2(width))
        _gated_kernel[(num_rows, triton.cdiv(width, block))](
            gate_up, out, gate_up.stride(0), width, GELU=gelu, BLOCK=block, num_warps=4
        )
    return out


@triton.jit
def tanh(x):
    """To float32's rounding at any size: of small values the series, which does not cancel."""
    square = x * x
    series = x * (1.0 + square * (-0.33333333 + square * (0.13333333 + square * (-0.053968254 + square * 0.021869488))))
    small = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - small) / (1.0 + small)
    return tl.where(square < 0.04, series, tl.where(x < 0.0, -large, large))


@triton.jit
def _gated_kernel(gate_up, out, row_stride, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(gate_up + row * row_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + width + columns, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        inner = 0.7978845608028654 * gate * (1.0 + 0.044715 * gate * gate)
        result = 0.5 * gate * (1.0 + tanh(inner)) * up
    else:
        result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * width + columns, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_values"])
def _softcap_kernel(x, out, num_values, cap, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < num_values
    values = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + places, cap * tanh(values / cap), mask=mask)
