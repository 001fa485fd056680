"""Linear layer: a weight in the backend's layout and an optional bias."""

from __future__ import annotations

from typing import Any

from pelton.worker.kernels.ops import Array, Ops


class Linear:
    """y [T, O] = x [T, I] W^T + b. Several matrices of a file may lie one below another in W."""

    def __init__(self, weight: Any, bias: Array | None = None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, ops: Ops, x: Array) -> Array:
        return ops.linear(x, self._weight, self._bias)
