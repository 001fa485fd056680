"""Token ids in, logits out."""

from __future__ import annotations

import torch

from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.ops import Kernels
from pelton.worker.layers.linear import Linear


class TokenEmbedding:
    """Keeps the table packed, as the file holds it: for the 0.5B model 145 MB of shared file pages
    instead of 545 MB of float32, whether or not the head uses the same weights."""

    def __init__(self, kernels: Kernels, table: WeightTensor, dtype: torch.dtype, scale: float) -> None:
        self._kernels = kernels
        self._table = table
        self._dtype = dtype
        # Rounded to the model's dtype, as Gemma was trained.
        self._scale = torch.tensor(scale, dtype=dtype).item()

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids [T] -> [T, H]."""
        hidden = self._kernels.embedding(token_ids, self._table, self._dtype)
        return hidden if self._scale == 1.0 else hidden.mul_(self._scale)


class LMHead:
    def __init__(self, kernels: Kernels, linear: Linear, softcap: float | None) -> None:
        self._kernels = kernels
        self._linear = linear
        self._softcap = softcap

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [S, H] -> logits [S, V] float32."""
        logits = self._linear(hidden).float()
        return logits if self._softcap is None else self._kernels.softcap(logits, self._softcap)
