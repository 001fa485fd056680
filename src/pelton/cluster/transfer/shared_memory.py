"""Blocks in memory that engines of one host share: a file without a name, which goes from one to the other.

It is nobody's to clean up after `kill -9`, is not bounded by the size of /dev/shm, and is sealed: others may read it,
and none can make it shorter under a reader.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from pelton.cluster.transfer.mover import MoverSize, TransferError
from pelton.core.errors import ConfigError

_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; the module `fcntl` does not have it
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE


class SharedMemoryMover:
    """Implements `Mover`."""

    def __init__(self, size: MoverSize, device: str) -> None:
        """Takes the outbox's memory at once. Raises `ConfigError` where it cannot be had."""
        del device  # steps copy between it and host memory
        self._block_bytes = size.block_bytes
        self.inbox: Any = np.empty((size.num_inbox_slots, size.block_bytes), dtype=np.uint8)
        self._file = -1
        if not size.num_outbox_slots:
            self.outbox: Any = np.empty((0, size.block_bytes), dtype=np.uint8)
            return
        num_bytes = size.num_outbox_slots * size.block_bytes
        try:
            self._file = os.memfd_create("pelton-kv-outbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.posix_fallocate(self._file, 0, num_bytes)  # later would be a signal, not an error
            memory = mmap.mmap(self._file, num_bytes)
            fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"kv_transfer_gb: {num_bytes / 2**30:.2f} GiB of shared memory cannot be had: {error.strerror or error}"
            ) from error
        self.outbox = np.frombuffer(memory, dtype=np.uint8).reshape(-1, size.block_bytes)

    def describe(self) -> tuple[bytes, tuple[int, ...]]:
        return b"", (self._file,)

    def open(self, description: bytes, files: Sequence[int], num_slots: int) -> SharedOutbox:
        del description
        try:
            if len(files) != 1:
                raise TransferError("it has handed over no shared memory")
            return SharedOutbox(files[0], num_slots, self._block_bytes, self.inbox)
        finally:
            for file in files:
                os.close(file)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class SharedOutbox:
    """Implements `RemoteOutbox`."""

    def __init__(self, file: int, num_slots: int, block_bytes: int, inbox: Any) -> None:
        self._inbox = inbox
        num_bytes = num_slots * block_bytes
        try:
            is_sealed = fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            if not num_slots or not is_sealed or os.fstat(file).st_size != num_bytes:
                raise TransferError("its shared memory is not what it says")
            memory = mmap.mmap(file, num_bytes, prot=mmap.PROT_READ)
        except OSError as error:
            raise TransferError(f"its shared memory cannot be mapped: {error.strerror or error}") from error
        self._slots = np.frombuffer(memory, dtype=np.uint8).reshape(num_slots, block_bytes)

    def read(self, slot_ids: Sequence[int], inbox_ids: Sequence[int]) -> None:
        for slot_id, inbox_id in zip(slot_ids, inbox_ids, strict=True):
            np.copyto(self._inbox[inbox_id], self._slots[slot_id])

    def close(self) -> None:
        """Unmapped with the last array that reads it."""
        del self._slots
