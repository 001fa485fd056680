"""Mixture of gated feed-forward layers (Shazeer et al., arXiv:1701.06538)."""

from __future__ import annotations

from typing import Any

from pelton.worker.kernels.ops import Array, Ops
from pelton.worker.layers.linear import Linear


class MixtureOfExperts:
    """The router chooses `num_chosen` experts for each token, and adds up their results."""

    def __init__(self, router: Linear, experts: Any, num_chosen: int, normalizes: bool) -> None:
        self._router = router
        self._experts = experts
        self._num_chosen = num_chosen
        self._normalizes = normalizes

    def __call__(self, ops: Ops, x: Array) -> Array:
        return ops.moe(x, self._router(ops, x), self._experts, self._num_chosen, self._normalizes)
