"""RMSNorm layer."""

from __future__ import annotations

import torch

from pelton.worker.kernels.ops import Kernels


class RMSNorm:
    """Over the last axis. `weight` is what multiplies: Gemma's 1 + w is added up at load."""

    def __init__(self, kernels: Kernels, weight: torch.Tensor, eps: float) -> None:
        self._kernels = kernels
        self._weight = weight
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.rms_norm(x, self._weight, self._eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual); the inputs must not be used again."""
        return self._kernels.add_rms_norm(x, residual, self._weight, self._eps)
