"""`PrefixIndex`: how much of a chain of blocks exists, on the device or in host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat

from pelton.core.batch import NULL_BLOCK_ID, BlockKey
from pelton.core.model_spec import KVGroupSpec
from pelton.engine.kv.block_pool import BlockPool
from pelton.engine.kv.tiers import KVTiers

IsKnown = Callable[[BlockKey], bool]
# Blocks that are looked up at once: a few, in case they are not there, then more.
_FIRST_RUN = 16
_LONGEST_RUN = 1024


@dataclass(frozen=True, slots=True)
class BlockLoad:
    """A block of a match that is to be copied from host memory into the request's table."""

    group_id: int
    index: int
    slot_id: int
    key: BlockKey


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """KV that already exists for a request's first `num_tokens` tokens: one list of blocks per group.

    `NULL_BLOCK_ID` stands where a window has passed, and where one of `loads` is to come.
    """

    block_ids: tuple[tuple[int, ...], ...]
    num_tokens: int
    loads: tuple[BlockLoad, ...] = ()


@dataclass(slots=True)
class ChainMemo:
    """How much of one chain was known when it was last matched: what came or went since then is soon looked through.

    Counts are of whole blocks that every group without a window holds.
    """

    num_near: int = 0  # on the device
    num_known: int = 0  # there or in host memory
    num_removed: tuple[int, ...] = ()  # from each pool until then
    match: PrefixMatch | None = None  # for `num_tokens`; all on the device, and no group has a window
    num_tokens: int = 0


@dataclass(slots=True)
class RequestMemo:
    """Of a waiting request: for the chain of its tokens, and for what a preemption has kept."""

    public: ChainMemo = field(default_factory=ChainMemo)
    kept: ChainMemo = field(default_factory=ChainMemo)


class PrefixIndex:
    """Looks up chains of block hashes; changes nothing."""

    def __init__(
        self, groups: tuple[KVGroupSpec, ...], pool: BlockPool, block_size: int, tiers: KVTiers | None
    ) -> None:
        self._groups = groups
        self._pool = pool
        self._block_size = block_size
        self._tiers = tiers
        self._pools = (pool,) if tiers is None else (pool, tiers.host)
        self._full_groups = [group_id for group_id, group in enumerate(groups) if group.sliding_window is None]
        self._has_windows = len(self._full_groups) < len(groups)
        self.no_match = PrefixMatch(tuple(() for _ in groups), 0)

    def first_visible_block(self, group: KVGroupSpec, position: int) -> int:
        """First block that the token at `position`, or any later one, attends to."""
        if group.sliding_window is None:
            return 0
        return max(0, position - group.sliding_window + 1) // self._block_size

    def match(self, hashes: Sequence[bytes], num_tokens: int, memo: ChainMemo | None = None) -> PrefixMatch:
        """Longest known start of a chain, of `num_tokens` tokens at most; its last block may be in part.

        `memo` is what is remembered of the same question. What is in host memory counts where copying it is
        faster than computing it again.
        """
        memo = memo or ChainMemo()
        self._look_up(memo, hashes, min(-(-num_tokens // self._block_size), len(hashes)))
        if memo.match is not None and memo.num_tokens == num_tokens:
            return memo.match
        match = self._match_of(hashes, num_tokens, self._settle(hashes, num_tokens, memo.num_known, self._is_known))
        if self._tiers is not None and match.loads:
            num_near = self._settle(hashes, num_tokens, memo.num_near, self._is_near)
            start = min(num_tokens, num_near * self._block_size)
            if not self._tiers.pays_to_load(len(match.loads), start, match.num_tokens):
                return self._match_of(hashes, num_tokens, num_near)
        elif not self._has_windows:
            memo.match, memo.num_tokens = match, num_tokens
        return match

    def _look_up(self, memo: ChainMemo, hashes: Sequence[bytes], num_blocks: int) -> None:
        """Bring the memo up to date: what has left the pools, then what goes on after the known part."""
        num_removed = tuple(pool.num_removed for pool in self._pools)
        if num_removed != memo.num_removed:
            self._drop_removed(memo, hashes)
            memo.num_removed = num_removed
        num_near = self._num_known(hashes, memo.num_near, num_blocks, self._pools[:1])
        num_known = max(num_near, memo.num_known)
        if len(self._pools) > 1:
            num_known = self._num_known(hashes, num_known, num_blocks, self._pools)
        if (num_near, num_known) != (memo.num_near, memo.num_known):
            memo.num_near, memo.num_known, memo.match = num_near, num_known, None

    def _drop_removed(self, memo: ChainMemo, hashes: Sequence[bytes]) -> None:
        for pool, num_removed in zip(self._pools, memo.num_removed, strict=False):
            removed = pool.removed_since(num_removed)
            if removed is None:  # more than it takes to look again
                memo.num_near, memo.num_known, memo.match = 0, 0, None
                return
            for key, index in removed:
                if index < memo.num_known and hashes[index] == key[1]:
                    memo.match = None
                    if key[0] in self._full_groups:
                        memo.num_near = memo.num_near if self._is_near(key) else min(memo.num_near, index)
                        memo.num_known = memo.num_known if self._is_known(key) else index

    def _num_known(self, hashes: Sequence[bytes], start: int, end: int, pools: Sequence[BlockPool]) -> int:
        """Blocks, of which the first `start` are known, that all groups without a window have in one of `pools`."""
        for group_id in self._full_groups:
            low, run = start, _FIRST_RUN
            while low < end:
                high = min(low + run, end)
                found = pools[0].find_all(zip(repeat(group_id), hashes[low:high]))
                if None in found and len(pools) > 1:
                    others = pools[1].find_all(zip(repeat(group_id), hashes[low:high]))
                    found = [one if other is None else other for one, other in zip(found, others, strict=True)]
                if None in found:
                    end = low + found.index(None)
                low, run = high, min(2 * run, _LONGEST_RUN)
        return end

    def num_known_tokens(self, hashes: Sequence[bytes], is_known: IsKnown) -> int:
        """Tokens of the longest start of which every visible block is known; whole blocks."""
        return self._longest(hashes, len(hashes) * self._block_size, is_known) * self._block_size

    def visible_keys(self, hashes: Sequence[bytes]) -> dict[BlockKey, int]:
        """What a request needs that goes on after these whole blocks, with its place in the chain."""
        num_blocks = len(hashes)
        position = num_blocks * self._block_size
        return {
            (group_id, hashes[index]): index
            for group_id, group in enumerate(self._groups)
            for index in range(self.first_visible_block(group, position), num_blocks)
        }

    def _is_near(self, key: BlockKey) -> bool:
        return self._pool.find(key) is not None

    def _is_known(self, key: BlockKey) -> bool:
        return self._pool.find(key) is not None or (self._tiers is not None and self._tiers.find(key) is not None)

    def _longest(self, hashes: Sequence[bytes], num_tokens: int, is_known: IsKnown) -> int:
        """Blocks b such that every group holds what a token at the end of block b - 1 can see."""
        num_blocks = len(hashes)
        for group_id in self._full_groups:
            num_blocks = next((i for i in range(num_blocks) if not is_known((group_id, hashes[i]))), num_blocks)
        return self._settle(hashes, num_tokens, num_blocks, is_known)

    def _settle(self, hashes: Sequence[bytes], num_tokens: int, num_blocks: int, is_known: IsKnown) -> int:
        """Of blocks that groups without a window hold, those after which windows are whole too."""
        settled = not self._has_windows
        while num_blocks and not settled:
            settled = True
            for group_id, group in enumerate(self._groups):
                if group.sliding_window is None:
                    continue
                first = self.first_visible_block(group, min(num_tokens, num_blocks * self._block_size))
                missing = [i for i in range(first, num_blocks) if not is_known((group_id, hashes[i]))]
                if missing:
                    num_blocks, settled = missing[-1], False
        return num_blocks

    def _match_of(self, hashes: Sequence[bytes], num_tokens: int, num_blocks: int) -> PrefixMatch:
        if num_blocks == 0:
            return self.no_match
        num_tokens = min(num_tokens, num_blocks * self._block_size)
        tables = []
        loads = []
        for group_id, group in enumerate(self._groups):
            first = self.first_visible_block(group, num_tokens)
            found = self._pool.find_all(zip(repeat(group_id), hashes[first:num_blocks]))
            for index, block_id in enumerate(found, first) if None in found else ():
                if block_id is None:
                    key = (group_id, hashes[index])
                    slot_id = self._tiers.find(key) if self._tiers is not None else None
                    assert slot_id is not None
                    loads.append(BlockLoad(group_id, index, slot_id, key))
            tables.append((NULL_BLOCK_ID,) * first + tuple(block_id or NULL_BLOCK_ID for block_id in found))
        return PrefixMatch(tuple(tables), num_tokens, tuple(loads))
