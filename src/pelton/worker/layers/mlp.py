"""Gated feed-forward layer (SwiGLU and GeGLU, Shazeer, arXiv:2002.05202)."""

from __future__ import annotations

import torch

from pelton.worker.kernels.ops import Kernels
from pelton.worker.layers.linear import Linear


class GatedMLP:
    def __init__(self, kernels: Kernels, gate_up: Linear, down: Linear, hidden_act: str) -> None:
        self._gate_up = gate_up
        self._down = down
        self._activation = {"silu": kernels.silu_mul, "gelu_tanh": kernels.gelu_tanh_mul}[hidden_act]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._down(self._activation(self._gate_up(x)))
