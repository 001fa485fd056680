"""LoRA adapters on tensors: two thin products for the rows of each adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pelton.weights.lora.adapter import LoraWeights
from pelton.worker.forward_batch import Adapters
from pelton.worker.kernels.ops import LoraSite
from pelton.worker.kernels.reference.linear import DenseLoader, linear


@dataclass(frozen=True, slots=True)
class _Part:
    """One matrix of a product: its columns."""

    a: torch.Tensor  # as `DenseLoader` makes it
    b: torch.Tensor
    scale: float
    first: int
    last: int


class ReferenceAdapter:
    def __init__(self, weights: LoraWeights, sites: Sequence[LoraSite], dtype: torch.dtype) -> None:
        loader = DenseLoader(dtype)
        self.parts: dict[int, list[_Part]] = {}
        self.num_bytes = 0
        for index, site in enumerate(sites):
            column = 0
            for name, size in site.modules:
                module = weights.modules.get(name)
                if module is not None:
                    part = _Part(loader.load([module.a]), loader.load([module.b]), module.scale, column, column + size)
                    self.parts.setdefault(index, []).append(part)
                    self.num_bytes += module.rank * (size + site.num_inputs) * dtype.itemsize
                column += size


def add_lora(y: torch.Tensor, x: torch.Tensor, site: int, adapters: Adapters) -> torch.Tensor:
    for adapter, own in adapters:
        parts = adapter.parts.get(site)
        if not parts:
            continue
        rows = torch.from_numpy(own)
        x_own, y_own = x[rows], y[rows]
        for part in parts:
            y_own[:, part.first : part.last] += linear(linear(x_own, part.a), part.b) * part.scale
        y[rows] = y_own
    return y
