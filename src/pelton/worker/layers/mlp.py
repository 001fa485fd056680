"""Gated feed-forward layer (SwiGLU and GeGLU, Shazeer, arXiv:2002.05202)."""

from __future__ import annotations

from pelton.worker.kernels.ops import Array, Ops
from pelton.worker.layers.linear import Linear


class GatedMLP:
    def __init__(self, gate_up: Linear, down: Linear, hidden_act: str) -> None:
        self._gate_up = gate_up
        self._down = down
        self._hidden_act = hidden_act

    def __call__(self, ops: Ops, x: Array) -> Array:
        gate_up = self._gate_up(ops, x)
        return self._down(ops, ops.silu_mul(gate_up) if self._hidden_act == "silu" else ops.gelu_tanh_mul(gate_up))
