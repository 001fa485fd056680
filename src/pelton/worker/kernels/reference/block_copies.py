"""`TensorCopies`: KV blocks between tensors and host memory, all on the CPU."""

from __future__ import annotations

import torch

from pelton.worker.kernels.block_copies import ArrayCopies, Bytes


class TensorCopies(ArrayCopies):
    """Implements `BlockCopies`, at once."""

    def load(self, destination: torch.Tensor, source: Bytes) -> None:
        destination.copy_(torch.from_numpy(source).view(destination.dtype).view(destination.shape))

    def store(self, destination: Bytes, source: torch.Tensor) -> None:
        torch.from_numpy(destination).view(source.dtype).view(source.shape).copy_(source)
