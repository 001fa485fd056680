"""`Block`: one place for KV in some tier's memory, and what is known of the content it holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pelton.core.batch import BlockKey


@dataclass(slots=True)
class Block:
    block_id: int
    ref_count: int = 0
    key: BlockKey | None = None  # under which it is found; None: content not shared
    # Of the content, not of the place: they travel with it from tier to tier.
    index: int = 0  # its place in the chain: positions [index * block_size, ...)
    generation: int = 0  # turns that its chain had had when it was computed
    num_turns: int = 0  # most turns of a chain that it was part of
    last_used_s: float = 0.0  # when it was last given back


class EvictionPolicy(Protocol):
    """Keeps the cached blocks of one pool: those that nobody holds and that may be found again."""

    def add(self, block: Block) -> None:
        """`block` was given back by its last holder."""
        ...

    def reuse(self, block: Block) -> None:
        """`block` was found and is held again."""
        ...

    def discard(self, block: Block) -> None:
        """`block` is emptied for a reason that says nothing of its worth."""
        ...

    def pop(self) -> Block:
        """Give up the block that is worth least. There is one."""
        ...

    def __len__(self) -> int: ...

    def __contains__(self, block_id: object) -> bool: ...
