"""`KVManager`: block tables of requests over one pool, prefix matches, copy-on-write.

A model's layers fall into KV groups (`ModelSpec.kv_groups`); each request has one block table per
group, and all groups draw from one pool. Groups with a sliding window give back blocks that no later
token can see, leaving `NULL_BLOCK_ID` in the table (the hybrid allocator of vLLM v1).

Safe under overlap because steps run in the order they were scheduled: a block freed while a step
that still reads it is in flight is written only by a later step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pelton.core.batch import NULL_BLOCK_ID, KVOp, KVOpKind
from pelton.core.model_spec import KVGroupSpec
from pelton.core.request import Request
from pelton.engine.kv.block_hash import extend_block_hashes, root_hash
from pelton.engine.kv.block_pool import BlockPool
from pelton.engine.kv.pins import PinTable


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """KV that already exists for a request's first `num_tokens` tokens: one list of blocks per group."""

    block_ids: tuple[tuple[int, ...], ...]
    num_tokens: int


class KVManager:
    def __init__(
        self,
        groups: tuple[KVGroupSpec, ...],
        pool: BlockPool,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        identity: str = "",
    ) -> None:
        self.groups = groups
        self.pool = pool
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.pins: PinTable | None = None  # blocks kept between turns; they yield before a request does
        self._identity = identity
        self._has_windows = any(group.sliding_window is not None for group in groups)
        self._roots: dict[str, bytes] = {}
        self._no_match = PrefixMatch(tuple(() for _ in groups), 0)

    # -- prefixes ---------------------------------------------------------------------------------

    def prepare(self, request: Request) -> None:
        """Hash what is known of the request; called before it waits, so that `match` only looks up."""
        if self.enable_prefix_caching:
            extend_block_hashes(request, self._root(request.cache_salt), self.block_size)

    def match(self, request: Request) -> PrefixMatch:
        """Longest known prefix in full blocks, always leaving at least one token to compute."""
        if not self.enable_prefix_caching or request.sampling.prompt_logprobs is not None:
            return self._no_match
        hashes = request.block_hashes[: (request.num_known_tokens - 1) // self.block_size]
        num_blocks = self._longest_match(hashes)
        if num_blocks == 0:
            return self._no_match
        return PrefixMatch(
            tuple(self._matched_blocks(group_id, hashes[:num_blocks]) for group_id in range(len(self.groups))),
            num_blocks * self.block_size,
        )

    def _longest_match(self, hashes: list[bytes]) -> int:
        """Blocks b such that every group holds what a token at position b * block_size can see."""
        num_blocks = len(hashes)
        find = self.pool.find
        for group_id, group in enumerate(self.groups):
            if group.sliding_window is None:
                num_blocks = next((i for i in range(num_blocks) if find((group_id, hashes[i])) is None), num_blocks)
        settled = False
        while num_blocks and not settled:
            settled = True
            for group_id, group in enumerate(self.groups):
                if group.sliding_window is None:
                    continue
                first = self._first_visible_block(group, num_blocks * self.block_size)
                missing = [i for i in range(first, num_blocks) if find((group_id, hashes[i])) is None]
                if missing:
                    num_blocks, settled = missing[-1], False
        return num_blocks

    def _matched_blocks(self, group_id: int, hashes: list[bytes]) -> tuple[int, ...]:
        first = self._first_visible_block(self.groups[group_id], len(hashes) * self.block_size)
        found = [self.pool.find((group_id, block_hash)) for block_hash in hashes[first:]]
        return (NULL_BLOCK_ID,) * first + tuple(block_id for block_id in found if block_id is not None)

    def match_leader(self, request: Request, leader: Request, num_written_tokens: int) -> PrefixMatch | None:
        """The prompt blocks of a running sibling, up to the last prompt token; None: not there (any more).

        A block in part is shared too: whoever writes to it first copies it.
        """
        num_tokens = request.num_known_tokens - 1
        if request.output_token_ids or not leader.block_tables or num_written_tokens < num_tokens:
            return None
        num_blocks = -(-num_tokens // self.block_size)
        tables = []
        for group, table in zip(self.groups, leader.block_tables, strict=True):
            shared = tuple(table[:num_blocks])
            if NULL_BLOCK_ID in shared[self._first_visible_block(group, num_tokens) :]:
                return None  # the leader's window has moved on
            tables.append(shared)
        leader.num_writable_tokens = 0
        return PrefixMatch(tuple(tables), num_tokens)

    def _first_visible_block(self, group: KVGroupSpec, position: int) -> int:
        """First block that the token at `position`, or any later one, attends to."""
        if group.sliding_window is None:
            return 0
        return max(0, position - group.sliding_window + 1) // self.block_size

    # -- tables -----------------------------------------------------------------------------------

    def num_blocks_to_reach(self, request: Request, num_tokens: int) -> int:
        """Further blocks the request needs until `num_tokens` tokens are computed (an upper bound)."""
        tables = request.block_tables or [[] for _ in self.groups]
        start = request.num_computed_tokens
        return sum(
            self._num_missing(group, len(table), start, num_tokens)
            for group, table in zip(self.groups, tables, strict=True)
        )

    def can_admit(self, request: Request, match: PrefixMatch, num_reserved_blocks: int) -> bool:
        """Whether all known tokens of a waiting request fit beside `num_reserved_blocks` for others."""
        return self.num_blocks_short(request, match, num_reserved_blocks) <= 0

    def num_blocks_short(self, request: Request, match: PrefixMatch, num_reserved_blocks: int) -> int:
        """Blocks that are missing for `can_admit`; 0 or less: none."""
        needed = sum(
            self._num_missing(group, len(ids), match.num_tokens, request.num_known_tokens)
            for group, ids in zip(self.groups, match.block_ids, strict=True)
        )
        cow = len(self.groups) if match.num_tokens % self.block_size else 0
        leaving = sum(
            self.pool.num_cached_among(block_id for block_id in ids if block_id != NULL_BLOCK_ID)
            for ids in match.block_ids
        )
        return needed + cow + leaving + num_reserved_blocks - self.pool.num_available

    def _num_missing(self, group: KVGroupSpec, num_held: int, start: int, end: int) -> int:
        num_blocks = -(-end // self.block_size)
        if group.sliding_window is not None:
            # What has left the window by `end` was given back on the way there.
            num_blocks -= max(0, self._first_visible_block(group, end) - max(num_held, start // self.block_size))
        return max(0, num_blocks - num_held)

    def admit(self, request: Request, match: PrefixMatch) -> None:
        """Give a request its matched blocks. Follow with `try_extend`."""
        for ids in match.block_ids:
            self.pool.share(block_id for block_id in ids if block_id != NULL_BLOCK_ID)
        request.block_tables = [list(ids) for ids in match.block_ids]
        request.scheduled_block_tables = None
        request.num_computed_tokens = match.num_tokens
        request.num_writable_tokens = 0
        request.num_kv_tokens = match.num_tokens

    def try_extend(self, request: Request, num_new_tokens: int) -> list[KVOp] | None:
        """Make room for the next `num_new_tokens` tokens: all of it or None.

        Returns the copies that make shared blocks private before they are written.
        """
        start = request.num_computed_tokens
        end = start + num_new_tokens
        request.scheduled_block_tables = None
        self._leave_window(request, start)
        missing = [-(-end // self.block_size) - len(table) for table in request.block_tables]
        shared = self._shared_blocks_to_write(request, start)
        num_blocks = sum(n for n in missing if n > 0) + len(shared)
        if self.pins is not None:
            self.pins.yield_to_running(num_blocks)
        taken = self.pool.try_allocate(num_blocks)
        if taken is None:
            return None
        kv_ops = []
        for table, index in shared:
            private = taken.pop()
            kv_ops.append(KVOp(KVOpKind.COPY, table[index], private))
            self.pool.release((table[index],))
            table[index] = private
        for table, num_missing in zip(request.block_tables, missing, strict=True):
            for _ in range(num_missing):
                table.append(taken.pop())
        request.num_kv_tokens = end
        if not self._has_windows:
            request.num_writable_tokens = len(request.block_tables[0]) * self.block_size
        return kv_ops

    def _shared_blocks_to_write(self, request: Request, start: int) -> list[tuple[list[int], int]]:
        """Only the block that `start` falls into can be shared and written: later ones are new."""
        index, offset = divmod(start, self.block_size)
        if offset == 0:
            return []
        return [(table, index) for table in request.block_tables if self.pool.blocks[table[index]].ref_count > 1]

    def _leave_window(self, request: Request, position: int) -> None:
        for group, table in zip(self.groups, request.block_tables, strict=True):
            if group.sliding_window is None:
                continue
            index = min(self._first_visible_block(group, position), len(table)) - 1
            left = []
            while index >= 0 and table[index] != NULL_BLOCK_ID:
                left.append(table[index])
                table[index] = NULL_BLOCK_ID
                index -= 1
            self.pool.release(left)

    def commit(self, request: Request, start: int, end: int) -> None:
        """The KV of positions [start, end) has been computed: publish the blocks it filled."""
        if not self.enable_prefix_caching or start // self.block_size == end // self.block_size:
            return
        extend_block_hashes(request, self._root(request.cache_salt), self.block_size)
        num_full = min(end // self.block_size, len(request.block_hashes))
        for group_id, table in enumerate(request.block_tables):
            for index in range(start // self.block_size, num_full):
                if table[index] != NULL_BLOCK_ID:
                    self.pool.publish(table[index], (group_id, request.block_hashes[index]))

    def free(self, request: Request) -> None:
        """Give back everything; published blocks stay findable until their memory is needed."""
        for table in request.block_tables:
            self.pool.release(block_id for block_id in reversed(table) if block_id != NULL_BLOCK_ID)
        request.block_tables = []
        request.num_computed_tokens = 0
        request.num_writable_tokens = 0
        request.num_kv_tokens = 0

    def check(self, requests: Iterable[Request]) -> None:
        """Assert the block ledger (law 4) for the requests that may hold blocks, and for pins."""
        tables = [table for request in requests for table in request.block_tables]
        tables += [list(pin.block_ids) for pin in self.pins or ()]
        self.pool.check([block_id for block_id in table if block_id != NULL_BLOCK_ID] for table in tables)

    def _root(self, cache_salt: str) -> bytes:
        root = self._roots.get(cache_salt)
        if root is None:
            if len(self._roots) >= 4096:  # salts come from clients
                self._roots.clear()
            root = self._roots[cache_salt] = root_hash(self._identity, cache_salt)
        return root
