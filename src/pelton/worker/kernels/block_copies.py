"""How KV blocks are moved within the device, and between it and host memory."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
# numpy.ndarray or torch.Tensor: a block in every layer, strided. That of the cache's own type.
Block = Any


class BlockCopies(Protocol):
    """Copies come after all steps and copies before them, and steps after them, whether or not they have been
    done when a call returns."""

    def empty_host(self, num_blocks: int, block_bytes: int) -> Bytes:
        """Host memory [num_blocks, block_bytes] for `store` and `load`. Raises MemoryError."""
        ...

    def copy(self, destination: Block, source: Block) -> None:
        """Within the device."""
        ...

    def load(self, destination: Block, source: Bytes) -> None:
        """A block that was stored, [block_bytes]."""
        ...

    def store(self, destination: Bytes, source: Block) -> None: ...

    def wait(self) -> None:
        """Until what was stored is in host memory, and what was loaded is no longer read from there."""
        ...


class ArrayCopies:
    """Implements `BlockCopies` for numpy's arrays, at once."""

    def empty_host(self, num_blocks: int, block_bytes: int) -> Bytes:
        return np.empty((num_blocks, block_bytes), dtype=np.uint8)

    def copy(self, destination: Block, source: Block) -> None:
        destination[...] = source

    def load(self, destination: Block, source: Bytes) -> None:
        destination[...] = source.view(destination.dtype).reshape(destination.shape)

    def store(self, destination: Bytes, source: Block) -> None:
        destination.view(source.dtype).reshape(source.shape)[...] = source

    def wait(self) -> None:
        pass
