"""`PrefixIndex`: how much of a chain of blocks exists, on the device or in host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pelton.core.batch import NULL_BLOCK_ID, BlockKey
from pelton.core.model_spec import KVGroupSpec
from pelton.engine.kv.block_pool import BlockPool
from pelton.engine.kv.tiers import KVTiers

IsKnown = Callable[[BlockKey], bool]


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


class PrefixIndex:
    """Looks up chains of block hashes; changes nothing."""

    def __init__(
        self, groups: tuple[KVGroupSpec, ...], pool: BlockPool, block_size: int, tiers: KVTiers | None
    ) -> None:
        self._groups = groups
        self._pool = pool
        self._block_size = block_size
        self._tiers = tiers
        self.no_match = PrefixMatch(tuple(() for _ in groups), 0)

    def first_visible_block(self, group: KVGroupSpec, position: int) -> int:
        """First block that the token at `position`, or any later one, attends to."""
        if group.sliding_window is None:
            return 0
        return max(0, position - group.sliding_window + 1) // self._block_size

    def match(self, hashes: Sequence[bytes], num_tokens: int) -> PrefixMatch:
        """Longest known start of a chain that stands for `num_tokens` tokens; its last block may be in part.

        What is in host memory counts where copying it is faster than computing it again.
        """
        num_blocks = self._longest(hashes, num_tokens, self._is_known)
        if num_blocks == 0:
            return self.no_match
        match = self._match_of(hashes[:num_blocks], min(num_tokens, num_blocks * self._block_size))
        if self._tiers is not None and match.loads:
            num_near = self._longest(hashes, num_tokens, lambda key: self._pool.find(key) is not None)
            start = min(num_tokens, num_near * self._block_size)
            if not self._tiers.pays_to_load(len(match.loads), start, match.num_tokens):
                return self._match_of(hashes[:num_near], start)
        return match

    def num_known_tokens(self, hashes: Sequence[bytes], is_known: IsKnown) -> int:
        """Tokens of the longest start of which every visible block is known; whole blocks."""
        return self._longest(hashes, len(hashes) * self._block_size, is_known) * self._block_size

    def visible_keys(self, hashes: Sequence[bytes]) -> list[BlockKey]:
        """What a request needs that goes on after these whole blocks."""
        position = len(hashes) * self._block_size
        return [
            (group_id, block_hash)
            for group_id, group in enumerate(self._groups)
            for block_hash in hashes[self.first_visible_block(group, position) :]
        ]

    def _is_known(self, key: BlockKey) -> bool:
        return self._pool.find(key) is not None or (self._tiers is not None and self._tiers.find(key) is not None)

    def _longest(self, hashes: Sequence[bytes], num_tokens: int, is_known: IsKnown) -> int:
        """Blocks b such that every group holds what a token at the end of block b - 1 can see."""
        num_blocks = len(hashes)
        for group_id, group in enumerate(self._groups):
            if group.sliding_window is None:
                num_blocks = next((i for i in range(num_blocks) if not is_known((group_id, hashes[i]))), num_blocks)
        settled = False
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

    def _match_of(self, hashes: Sequence[bytes], num_tokens: int) -> PrefixMatch:
        tables = []
        loads = []
        for group_id, group in enumerate(self._groups):
            first = self.first_visible_block(group, num_tokens)
            table = [NULL_BLOCK_ID] * first
            for index in range(first, len(hashes)):
                key = (group_id, hashes[index])
                block_id = self._pool.find(key)
                if block_id is None:
                    assert self._tiers is not None
                    slot_id = self._tiers.find(key)
                    assert slot_id is not None
                    loads.append(BlockLoad(group_id, index, slot_id, key))
                    block_id = NULL_BLOCK_ID
                table.append(block_id)
            tables.append(tuple(table))
        return PrefixMatch(tuple(tables), num_tokens, tuple(loads))
