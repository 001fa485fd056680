"""`BlockPool`: who holds which KV block. Bookkeeping only; the bytes live in `worker/kv_storage.py`.

Every block is in exactly one of three states, and their counts add up to the total (law 4):
used (ref_count > 0), cached (ref_count 0, still holds KV that the prefix index knows), free.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from pelton.core.batch import NULL_BLOCK_ID


@dataclass(slots=True)
class Block:
    block_id: int
    ref_count: int = 0
    # (KV group, chain hash) under which the prefix index finds this block; None: content not shared.
    key: tuple[int, bytes] | None = None


class BlockPool:
    """Blocks 1 .. num_blocks - 1; block 0 is the null block. Least recently used cached blocks go first."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks is {num_blocks}; at least 2 are needed, one of them the null block")
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        self._free = list(range(num_blocks - 1, NULL_BLOCK_ID, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._index: dict[tuple[int, bytes], int] = {}

    @property
    def num_total(self) -> int:
        return len(self.blocks) - 1

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_total - self.num_available

    def try_allocate(self, num_blocks: int) -> list[int] | None:
        """Take blocks with ref_count 1, or None (and nothing taken) where there are not enough."""
        if num_blocks > self.num_available:
            return None
        taken = []
        for _ in range(num_blocks):
            if self._free:
                block_id = self._free.pop()
            else:
                block_id, _ = self._cached.popitem(last=False)
                self._forget(block_id)
            self.blocks[block_id].ref_count = 1
            taken.append(block_id)
        return taken

    def share(self, block_ids: Iterable[int]) -> None:
        """One more table names these blocks; a cached one becomes used again."""
        for block_id in block_ids:
            block = self.blocks[block_id]
            if block.ref_count == 0:
                del self._cached[block_id]
            block.ref_count += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """One table fewer names these blocks. Pass a table's tail first: then it is evicted first."""
        for block_id in block_ids:
            block = self.blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                if block.key is not None:
                    self._cached[block_id] = None
                else:
                    self._free.append(block_id)

    def find(self, key: tuple[int, bytes]) -> int | None:
        """The block that holds this content, used or cached."""
        return self._index.get(key)

    def publish(self, block_id: int, key: tuple[int, bytes]) -> None:
        """Make a used block findable. The first block of a key stays; a twin remains unpublished."""
        if key not in self._index and self.blocks[block_id].key is None:
            self.blocks[block_id].key = key
            self._index[key] = block_id

    def num_cached_among(self, block_ids: Iterable[int]) -> int:
        """How many of these would leave the available ones if they were shared."""
        return sum(1 for block_id in block_ids if self.blocks[block_id].ref_count == 0)

    def _forget(self, block_id: int) -> None:
        block = self.blocks[block_id]
        if block.key is not None:
            del self._index[block.key]
            block.key = None

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Assert law 4 against the tables that name blocks. For tests: linear in the pool."""
        counts = [0] * len(self.blocks)
        for table in tables:
            for block_id in table:
                counts[block_id] += 1
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & self._cached.keys(), "a block is both free and cached"
        for block in self.blocks[1:]:
            assert block.ref_count == counts[block.block_id], f"{block} is named by {counts[block.block_id]} tables"
            idle = block.block_id in free or block.block_id in self._cached
            assert idle == (block.ref_count == 0), f"{block} is in the wrong state"
            assert (block.block_id in self._cached) <= (block.key is not None), f"{block} is cached without a key"
        assert self._index == {block.key: block.block_id for block in self.blocks if block.key is not None}
        assert self.num_used + self.num_available == self.num_total
