"""Least recently used first: the baseline, and what every other engine does."""

from __future__ import annotations

from collections import OrderedDict

from pelton.engine.kv.block import Block


class LRUEviction:
    def __init__(self) -> None:
        self._blocks: OrderedDict[int, Block] = OrderedDict()  # oldest first

    def add(self, block: Block) -> None:
        self._blocks[block.block_id] = block

    def reuse(self, block: Block) -> None:
        del self._blocks[block.block_id]

    def discard(self, block: Block) -> None:
        del self._blocks[block.block_id]

    def pop(self) -> Block:
        return self._blocks.popitem(last=False)[1]

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block_id: object) -> bool:
        return block_id in self._blocks
