"""`BlockPool`: who holds which block of a tier. Bookkeeping only; the bytes live in `worker/`.

Every block is in exactly one of three states, and their counts add up to the total (law 4):
used (ref_count > 0), cached (ref_count 0, still holds KV that the index knows), free. The device's
KV cache is one pool; host memory is another, where a block is used while bytes move in or out of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from pelton.core.batch import NULL_BLOCK_ID, BlockKey
from pelton.engine.kv.block import Block, EvictionPolicy
from pelton.engine.kv.eviction.lru import LRUEviction

# Keys that are remembered after they have left a pool, so that who looked one up knows that it is gone.
REMOVALS_KEPT = 4096


class BlockPool:
    """Blocks 1 .. num_blocks - 1; block 0 is the null block. `eviction` chooses among the cached ones."""

    def __init__(self, num_blocks: int, eviction: EvictionPolicy | None = None) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks is {num_blocks}; at least 2 are needed, one of them the null block")
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        # Called with a block that still has its key and content, just before it becomes another's.
        self.on_evict: Callable[[Block], None] | None = None
        # Called with a block that holds findable content and has lost its last holder.
        self.on_cached: Callable[[Block], None] | None = None
        self._free = list(range(num_blocks - 1, NULL_BLOCK_ID, -1))
        self._cached = LRUEviction() if eviction is None else eviction
        self._index: dict[BlockKey, int] = {}
        self._removed: deque[tuple[BlockKey, int]] = deque(maxlen=REMOVALS_KEPT)
        self.num_removed = 0  # keys that were findable and are not (only grows)

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

    def published_keys(self) -> Iterator[BlockKey]:
        return iter(self._index)

    def try_allocate(self, num_blocks: int) -> list[int] | None:
        """Take blocks with ref_count 1, or None (and nothing taken) where there are not enough."""
        if num_blocks > self.num_available:
            return None
        taken = []
        free, blocks, on_evict = self._free, self.blocks, self.on_evict
        for _ in range(num_blocks):
            if free:
                block = blocks[free.pop()]
            else:
                block = self._cached.pop()
                if on_evict is not None:
                    on_evict(block)
                self._forget(block)
            block.ref_count = 1
            taken.append(block.block_id)
        return taken

    def share(self, block_ids: Iterable[int]) -> None:
        """One more table names these blocks; a cached one becomes used again."""
        for block_id in block_ids:
            block = self.blocks[block_id]
            if block.ref_count == 0:
                self._cached.reuse(block)
            block.ref_count += 1

    def hold(self, block_ids: Iterable[int]) -> None:
        """As `share`, for a holder that nobody asked for: says nothing of the content's worth."""
        for block_id in block_ids:
            block = self.blocks[block_id]
            if block.ref_count == 0:
                self._cached.discard(block)
            block.ref_count += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """One table fewer names these blocks. Pass a table's tail first: then it is evicted first."""
        blocks, add, on_cached = self.blocks, self._cached.add, self.on_cached
        for block_id in block_ids:
            block = blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                if block.key is not None:
                    add(block)
                    if on_cached is not None:
                        on_cached(block)
                else:
                    self._free.append(block_id)

    def find(self, key: BlockKey) -> int | None:
        """The block that holds this content, used or cached."""
        return self._index.get(key)

    def find_all(self, keys: Iterable[BlockKey]) -> list[int | None]:
        """`find` for each."""
        return list(map(self._index.get, keys))

    def removed_since(self, num_removed: int) -> Iterator[tuple[BlockKey, int]] | None:
        """Keys, with their place in their chain, that were removed after the first `num_removed`; None: too many."""
        number = self.num_removed - num_removed
        return islice(reversed(self._removed), number) if number <= len(self._removed) else None

    def publish(self, block_id: int, key: BlockKey, index: int = 0, generation: int = 0) -> None:
        """Make a used block findable. The first block of a key stays; a twin remains unpublished."""
        block = self.blocks[block_id]
        if key not in self._index and block.key is None:
            block.key, block.index = key, index
            block.generation = block.num_turns = generation
            self._index[key] = block_id

    def publish_chain(
        self, block_ids: Sequence[int], group_id: int, hashes: Sequence[bytes], first: int, generation: int
    ) -> None:
        """`publish` each of a chain's blocks from place `first` on, but for null blocks and those that have a key."""
        blocks, index = self.blocks, self._index
        for place, (block_id, block_hash) in enumerate(zip(block_ids, hashes, strict=True), first):
            block = blocks[block_id]
            if block.key is None and block_id != NULL_BLOCK_ID:
                key = (group_id, block_hash)
                if index.setdefault(key, block_id) == block_id:
                    block.key, block.index = key, place
                    block.generation = block.num_turns = generation

    def publish_like(self, block_id: int, other: Block) -> None:
        """Publish a copy of a block of another pool."""
        assert other.key is not None
        self.publish(block_id, other.key, other.index, other.generation)
        self.blocks[block_id].num_turns = other.num_turns

    def unpublish(self, block_id: int) -> None:
        """The block's content is not to be found any more; a cached block becomes free."""
        block = self.blocks[block_id]
        if block.key is None:
            return
        if block.ref_count == 0:
            self._cached.discard(block)
            self._free.append(block_id)
        self._forget(block)

    def num_cached_among(self, block_ids: Iterable[int]) -> int:
        """How many of these would leave the available ones if they were shared."""
        return sum(1 for block_id in block_ids if self.blocks[block_id].ref_count == 0)

    def _forget(self, block: Block) -> None:
        if block.key is not None:
            del self._index[block.key]
            self._removed.append((block.key, block.index))
            self.num_removed += 1
            block.key = None

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Assert law 4 against the tables that name blocks. For tests: linear in the pool."""
        counts = [0] * len(self.blocks)
        for table in tables:
            for block_id in table:
                counts[block_id] += 1
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        for block in self.blocks[1:]:
            is_cached = block.block_id in self._cached
            assert block.ref_count == counts[block.block_id], f"{block} is named by {counts[block.block_id]} tables"
            assert not (block.block_id in free and is_cached), f"{block} is both free and cached"
            idle = block.block_id in free or is_cached
            assert idle == (block.ref_count == 0), f"{block} is in the wrong state"
            assert is_cached <= (block.key is not None), f"{block} is cached without a key"
        assert self._index == {block.key: block.block_id for block in self.blocks if block.key is not None}
        assert self.num_used + self.num_available == self.num_total
