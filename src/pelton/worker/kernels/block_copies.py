"""How KV blocks are moved within the device, and between it and host memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
# numpy.ndarray or torch.Tensor: a block in every layer, strided. That of the cache's own type.
Block = Any


@dataclass(frozen=True, slots=True)
class CopyTimes:
    """Seconds on a device. Steps wait for loads, and for no stores."""

    loads_s: float
    stores_s: float


class RunningCopies(Protocol):
    """Those of one step, which a device may still be at."""

    def wait(self) -> CopyTimes | None:
        """Until what they store is in host memory, and what they load is no longer read from there.

        Returns what they took; None where they were done when they had been asked for.
        """
        ...


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

    def take_running(self) -> RunningCopies:
        """All that were asked for since the last call."""
        ...


class DoneCopies:
    """Implements `RunningCopies`."""

    def wait(self) -> CopyTimes | None:
        return None


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

    def take_running(self) -> RunningCopies:
        return DoneCopies()
