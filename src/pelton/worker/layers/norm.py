"""RMSNorm layer."""

from __future__ import annotations

from pelton.worker.kernels.ops import Array, Ops


class RMSNorm:
    """Over the last axis. `weight` is what multiplies: Gemma's 1 + w is added up at load."""

    def __init__(self, weight: Array, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, ops: Ops, x: Array) -> Array:
        return ops.rms_norm(x, self._weight, self._eps)

    def add(self, ops: Ops, x: Array, residual: Array | None) -> tuple[Array, Array]:
        """(norm(x + residual), x + residual); the inputs must not be used again. No residual counts as 0."""
        if residual is None:
            return self(ops, x), x
        return ops.add_rms_norm(x, residual, self._weight, self._eps)
