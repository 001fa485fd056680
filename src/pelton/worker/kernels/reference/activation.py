"""Activations. Written with exp and tanh only: torch's silu and gelu round the last few elements of each
thread's share differently, so that a row would depend on how many others there are (law 3)."""

from __future__ import annotations

import math

import torch


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = _halves(gate_up)
    result = torch.neg(gate).exp_().add_(1.0)
    return torch.div(gate, result, out=result).mul_(up).to(gate_up.dtype)


def gelu_tanh_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), Hendrycks and Gimpel, arXiv:1606.08415."""
    gate, up = _halves(gate_up)
    inner = torch.mul(gate, gate).mul_(0.044715).add_(1.0).mul_(gate).mul_(math.sqrt(2.0 / math.pi))
    return inner.tanh_().add_(1.0).mul_(gate).mul_(0.5).mul_(up).to(gate_up.dtype)


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    return torch.div(x.float(), cap).tanh_().mul_(cap)


def _halves(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate.float(), up.float()
