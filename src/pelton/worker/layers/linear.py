"""Linear layer: a weight in the backend's layout and an optional bias."""

from __future__ import annotations

from typing import Any

import torch

from pelton.worker.kernels.ops import Kernels


class Linear:
    """y [T, O] = x [T, I] W^T + b. Several matrices of a file may lie one below another in W."""

    def __init__(self, kernels: Kernels, weight: Any, bias: torch.Tensor | None = None) -> None:
        self._kernels = kernels
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.linear(x, self._weight, self._bias)
