"""What connectors differ in: a `Mover` has the memory and copies blocks. Who asks whom for what is the same for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class TransferError(Exception):
    """What was asked of another engine has not come, or cannot be trusted: it is computed instead."""


class LinkClosedError(TransferError):
    """The other engine has ended the connection."""


@dataclass(frozen=True, slots=True)
class MoverSize:
    num_inbox_slots: int
    num_outbox_slots: int
    block_bytes: int


class RemoteOutbox(Protocol):
    """Another engine's outbox. Used by one thread."""

    def read(self, slot_ids: Sequence[int], inbox_ids: Sequence[int]) -> None:
        """Copy its slots into those of the own inbox; returns when they are there. Raises `TransferError`."""
        ...

    def close(self) -> None: ...


class Mover(Protocol):
    """Memory of blocks that are on their way: bytes [num_slots, block_bytes] each."""

    inbox: Any
    outbox: Any

    def describe(self) -> tuple[bytes, tuple[int, ...]]:
        """What another engine needs to read the outbox: bytes, and files to hand over with them."""
        ...

    def open(self, description: bytes, files: Sequence[int], num_slots: int) -> RemoteOutbox:
        """Takes over `files`. Raises `TransferError` for what does not describe an outbox of as many slots."""
        ...

    def close(self) -> None: ...
