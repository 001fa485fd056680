"""`KVManager`: block tables of requests over one pool, prefix matches, copy-on-write.

A model's layers fall into KV groups (`ModelSpec.kv_groups`); each request has one block table per
group, and all groups draw from one pool. Groups with a sliding window give back blocks that no later
token can see, leaving `NULL_BLOCK_ID` in the table (the hybrid allocator of vLLM v1).

Safe under overlap because steps run in the order they were scheduled: a block freed while a step
that still reads it is in flight is written only by a later step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from pelton.core.batch import NULL_BLOCK_ID, BlockKey, KVOp, KVOpKind
from pelton.core.model_spec import KVGroupSpec
from pelton.core.request import Request
from pelton.engine.kv.block_hash import extend_block_hashes, is_private, private_hash, root_hash
from pelton.engine.kv.block_pool import BlockPool
from pelton.engine.kv.pins import PinTable
from pelton.engine.kv.prefix_match import PrefixIndex, PrefixMatch, RequestMemo
from pelton.engine.kv.tiers import KVTiers

if TYPE_CHECKING:
    from pelton.engine.kv.transfer import KVTransfer


class KVManager:
    def __init__(
        self,
        groups: tuple[KVGroupSpec, ...],
        pool: BlockPool,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        identity: str = "",
        tiers: KVTiers | None = None,
    ) -> None:
        self.groups = groups
        self.pool = pool
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.pins: PinTable | None = None  # blocks kept between turns; they yield before a request does
        self._identity = identity
        self._has_windows = any(group.sliding_window is not None for group in groups)
        self._roots: dict[tuple[str, str], bytes] = {}
        self.tiers = tiers
        self.transfer: KVTransfer | None = None  # blocks from and to other engines
        self.ops: list[KVOp] = tiers.ops if tiers is not None else []  # for the next batch, in order
        self.prefixes = PrefixIndex(groups, pool, block_size, tiers)
        if tiers is not None:
            pool.on_evict = tiers.store
            pool.on_cached = tiers.note_cached

    # -- prefixes ---------------------------------------------------------------------------------

    def prepare(self, request: Request) -> None:
        """Hash what is known of the request; called before it waits, so that `match` only looks up."""
        if self.enable_prefix_caching:
            extend_block_hashes(request, self._root(request), self.block_size)

    def match(self, request: Request) -> PrefixMatch:
        """Longest known prefix, always leaving at least one token to compute.

        Whole blocks, and what a preempted request has computed beyond them. A request that is still to
        tell logprobs of its prompt, or that pools the hidden states of all of it, has to compute it. Asked
        again of a waiting request, it looks through what has changed since.
        """
        if request.sampling.pooling is not None and request.sampling.pooling.needs_all_tokens:
            return self.prefixes.no_match
        if request.sampling.prompt_logprobs is not None and request.num_prompt_logprobs < request.num_prompt_tokens - 1:
            return self.prefixes.no_match
        num_most = request.num_known_tokens - 1
        memo = request.prefix_memo
        if not isinstance(memo, RequestMemo):
            memo = request.prefix_memo = RequestMemo()
        own = min(request.num_kept_tokens, num_most)
        kept = self.prefixes.match(request.kept_hashes, own, memo.kept) if own else self.prefixes.no_match
        if not self.enable_prefix_caching:
            return kept
        num_blocks = num_most // self.block_size
        if num_blocks * self.block_size <= kept.num_tokens:
            return kept
        found = self.prefixes.match(request.block_hashes, num_blocks * self.block_size, memo.public)
        return found if found.num_tokens > kept.num_tokens else kept

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
            if NULL_BLOCK_ID in shared[self.prefixes.first_visible_block(group, num_tokens) :]:
                return None  # the leader's window has moved on
            tables.append(shared)
        leader.num_writable_tokens = 0
        return PrefixMatch(tuple(tables), num_tokens)

    # -- tables -----------------------------------------------------------------------------------

    def num_blocks_to_reach(self, request: Request, num_tokens: int) -> int:
        """Further blocks the request needs until `num_tokens` tokens are computed (an upper bound)."""
        tables = request.block_tables or [[] for _ in self.groups]
        start = request.num_computed_tokens
        return sum(
            self._num_missing(group, len(table), start, num_tokens)
            for group, table in zip(self.groups, tables, strict=True)
        )

    def _num_to_copy(self, match: PrefixMatch) -> int:
        """Blocks to be made private: the last one of each group, where it is matched in part and another's too."""
        if match.num_tokens % self.block_size == 0:
            return 0
        last = [ids[-1] for ids in match.block_ids if ids and ids[-1] != NULL_BLOCK_ID]
        return sum(1 for block_id in last if self.pool.blocks[block_id].ref_count)

    def can_admit(self, request: Request, match: PrefixMatch, num_reserved_blocks: int) -> bool:
        """Whether all known tokens of a waiting request fit beside `num_reserved_blocks` for others."""
        num_free = self.pool.num_available - num_reserved_blocks - self._num_to_take(request, match)
        # Looking at every block of a match is for those that may fit.
        return num_free >= 0 and num_free >= self._num_leaving(match)

    def num_blocks_short(self, request: Request, match: PrefixMatch, num_reserved_blocks: int) -> int:
        """Blocks that are missing for `can_admit`; 0 or less: none."""
        num_needed = self._num_to_take(request, match) + self._num_leaving(match)
        return num_needed + num_reserved_blocks - self.pool.num_available

    def _num_to_take(self, request: Request, match: PrefixMatch) -> int:
        """Blocks that a waiting request needs beside those of its match."""
        needed = sum(
            self._num_missing(group, len(ids), match.num_tokens, request.num_known_tokens)
            for group, ids in zip(self.groups, match.block_ids, strict=True)
        )
        return needed + len(match.loads) + self._num_to_copy(match)

    def _num_leaving(self, match: PrefixMatch) -> int:
        """Available blocks that a match would take."""
        return sum(
            self.pool.num_cached_among(block_id for block_id in ids if block_id != NULL_BLOCK_ID)
            for ids in match.block_ids
        )

    def _num_missing(self, group: KVGroupSpec, num_held: int, start: int, end: int) -> int:
        num_blocks = -(-end // self.block_size)
        if group.sliding_window is not None:
            # What has left the window by `end` was given back on the way there.
            num_blocks -= max(
                0, self.prefixes.first_visible_block(group, end) - max(num_held, start // self.block_size)
            )
        return max(0, num_blocks - num_held)

    def admit(self, request: Request, match: PrefixMatch) -> None:
        """Give a request its matched blocks. Follow with `try_extend`."""
        for ids in match.block_ids:
            self.pool.share(block_id for block_id in ids if block_id != NULL_BLOCK_ID)
        request.block_tables = [list(ids) for ids in match.block_ids]
        if match.loads:
            self._load(request, match)
        self._count_turn(request)
        self._reclaim(request, match.num_tokens)
        request.scheduled_block_tables = None
        request.num_computed_tokens = match.num_tokens
        request.num_writable_tokens = 0
        request.num_kv_tokens = match.num_tokens

    def _count_turn(self, request: Request) -> None:
        """What a request goes on from is worth what its chain is: a conversation that goes on may go on again."""
        tables = [[self.pool.blocks[block_id] for block_id in table] for table in request.block_tables]
        if tables[0] and not request.num_preemptions:
            request.generation = tables[0][-1].generation + 1
        generation = request.generation
        for block in chain.from_iterable(tables):
            if block.num_turns < generation:
                block.num_turns = generation

    def _load(self, request: Request, match: PrefixMatch) -> None:
        """Copy what a match found in host memory into blocks of the device, where others find it too."""
        assert self.tiers is not None
        self.tiers.hold([load.slot_id for load in match.loads])  # before room is made, which evicts to the host
        taken = self.pool.try_allocate(len(match.loads))
        assert taken is not None, "a match was admitted without room for what it loads"
        for load, block_id in zip(match.loads, taken, strict=True):
            self.tiers.load(load.slot_id, block_id)
            request.block_tables[load.group_id][load.index] = block_id
            self.pool.publish_like(block_id, self.tiers.host.blocks[load.slot_id])

    def try_extend(self, request: Request, num_new_tokens: int) -> list[KVOp] | None:
        """Make room for the next `num_new_tokens` tokens: all of it or None.

        Returns what has to be moved before the next step: evicted and loaded blocks, and the copies that
        make shared blocks private before they are written.
        """
        start = request.num_computed_tokens
        end = start + num_new_tokens
        request.scheduled_block_tables = None
        if self._has_windows:
            self._leave_window(request, start)
        num_all = -(-end // self.block_size)
        missing = [max(0, num_all - len(table)) for table in request.block_tables]
        shared = self._shared_blocks_to_write(request, start)
        num_blocks = sum(missing) + len(shared)
        if self.pins is not None:
            self.pins.yield_to_running(num_blocks)
        taken = self.pool.try_allocate(num_blocks)
        if taken is None:
            return None
        kv_ops = self._take_ops()
        for table, index in shared:
            private = taken.pop()
            kv_ops.append(KVOp(KVOpKind.COPY, table[index], private))
            self.pool.release((table[index],))
            table[index] = private
        for table, num_missing in zip(request.block_tables, missing, strict=True):
            if num_missing:
                table += taken[: -num_missing - 1 : -1]
                del taken[-num_missing:]
        request.num_kv_tokens = end
        if not self._has_windows:
            request.num_writable_tokens = len(request.block_tables[0]) * self.block_size
        return kv_ops

    def _take_ops(self) -> list[KVOp]:
        ops = self.ops.copy()
        self.ops.clear()
        return ops

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
            index = min(self.prefixes.first_visible_block(group, position), len(table)) - 1
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
        extend_block_hashes(request, self._root(request), self.block_size)
        num_full = min(end // self.block_size, len(request.block_hashes))
        first = start // self.block_size
        hashes = request.block_hashes[first:num_full]
        for group_id, table in enumerate(request.block_tables):
            self.pool.publish_chain(table[first:num_full], group_id, hashes, first, request.generation)

    def free(self, request: Request) -> None:
        """Give back everything; published blocks stay findable until their memory is needed."""
        for table in request.block_tables:
            self.pool.release(block_id for block_id in reversed(table) if block_id != NULL_BLOCK_ID)
        request.block_tables = []
        request.num_computed_tokens = 0
        request.num_writable_tokens = 0
        request.num_kv_tokens = 0

    def preempt(self, request: Request) -> None:
        """Give back everything, but let this request find what it has computed, to the last token.

        What the step in flight computes counts: the request is not admitted before that has ended well,
        and until then nobody else finds what only its own hashes name.
        """
        num_tokens = min(request.num_computed_tokens, request.num_known_tokens)
        kept = []
        for index in range(-(-num_tokens // self.block_size)):
            block_hash = self._public_hash(request, index, num_tokens) or self._try_keep(request, index)
            if block_hash is None:
                break
            kept.append(block_hash)
        request.kept_hashes = kept
        request.num_kept_tokens = min(num_tokens, len(kept) * self.block_size)
        self.free(request)

    def _public_hash(self, request: Request, index: int, num_tokens: int) -> bytes | None:
        """The hash of a full block that everybody finds in every group."""
        if not self.enable_prefix_caching or (index + 1) * self.block_size > num_tokens:
            return None
        block_hash = request.block_hashes[index] if index < len(request.block_hashes) else None
        for group_id, table in enumerate(request.block_tables):
            if block_hash and table[index] != NULL_BLOCK_ID and self.pool.find((group_id, block_hash)) is None:
                return None
        return block_hash

    def _try_keep(self, request: Request, index: int) -> bytes | None:
        """Publish a block of every group under a hash that only this request knows."""
        block_ids = [table[index] for table in request.block_tables]
        held = [self.pool.blocks[block_id] for block_id in block_ids if block_id != NULL_BLOCK_ID]
        if any(block.ref_count > 1 or block.key is not None for block in held):
            return None  # shared in part with a sibling
        block_hash = private_hash(request, index)
        for group_id, block_id in enumerate(block_ids):
            if block_id != NULL_BLOCK_ID:
                self.pool.publish(block_id, (group_id, block_hash), index, request.generation)
        return block_hash

    def _reclaim(self, request: Request, num_tokens: int) -> None:
        """An admitted request needs its private hashes no more; blocks that it filled are everybody's."""
        self.forget(request)
        self.prepare(request)
        if not self.enable_prefix_caching or not num_tokens:
            return
        num_full = num_tokens // self.block_size
        hashes = request.block_hashes[:num_full]
        for group_id, table in enumerate(request.block_tables):
            self.pool.publish_chain(table[:num_full], group_id, hashes, 0, request.generation)

    def forget(self, request: Request) -> None:
        """Nobody will ask any more for what a preempted request kept for itself."""
        for block_hash in request.kept_hashes:
            if not is_private(block_hash):
                continue
            for group_id in range(len(self.groups)):
                self._unpublish((group_id, block_hash))
        request.kept_hashes = []
        request.num_kept_tokens = 0
        request.prefix_memo = None

    def _unpublish(self, key: BlockKey) -> None:
        for pool in (self.pool, self.tiers.host) if self.tiers is not None else (self.pool,):
            block_id = pool.find(key)
            if block_id is not None:
                pool.unpublish(block_id)

    def take_moves(self, num_blocks: int) -> list[KVOp]:
        """What else is to be moved with this step; up to `num_blocks` on their way to disk."""
        if self.tiers is not None:
            self.tiers.save(self.pool, num_blocks)
        return self._take_ops()

    def lose(self, kv_ops: Sequence[KVOp], later_ops: Sequence[KVOp]) -> set[int]:
        """A step failed, and may have moved nothing: what it was to bring is not found any more.

        `later_ops` are those of steps that had begun by then. Returns blocks that hold something else, perhaps, than
        their requests take them for.
        """
        slot_ids = {(op.tier, op.destination) for op in kv_ops if op.kind is KVOpKind.STORE}
        loads = [op for op in kv_ops if op.kind is KVOpKind.LOAD]
        loads += [op for op in later_ops if op.kind is KVOpKind.LOAD and (op.tier, op.source) in slot_ids]
        lost = {op.destination for op in loads}
        for block_id in lost:
            self.pool.unpublish(block_id)
        if self.tiers is not None:
            self.tiers.lose(kv_ops)
        if self.transfer is not None:
            self.transfer.lose(kv_ops)
        return lost

    def complete(self, kv_ops: Sequence[KVOp], elapsed_s: float = 0.0) -> None:
        """A step has ended, well or not; its operations took `elapsed_s`."""
        if self.tiers is not None:
            self.tiers.complete(kv_ops, elapsed_s)
        if self.transfer is not None:
            self.transfer.complete(kv_ops)

    def tier_stats(self) -> dict[str, int]:
        """Fields of `EngineStats`."""
        tiers = {} if self.tiers is None else self.tiers.stats(self.block_size, len(self.groups))
        return tiers | ({} if self.transfer is None else self.transfer.stats())

    def check(self, requests: Iterable[Request]) -> None:
        """Assert the block ledger (law 4) for the requests that may hold blocks, and for pins."""
        tables = [table for request in requests for table in request.block_tables]
        tables += [list(pin.block_ids) for pin in self.pins or ()]
        self.pool.check([block_id for block_id in table if block_id != NULL_BLOCK_ID] for table in tables)
        if self.tiers is not None:
            self.tiers.check()
        if self.transfer is not None:
            self.transfer.check()

    def _root(self, request: Request) -> bytes:
        key = (request.cache_salt, request.lora_id)
        root = self._roots.get(key)
        if root is None:
            if len(self._roots) >= 4096:  # salts come from clients
                self._roots.clear()
            root = self._roots[key] = root_hash(self._identity, *key)
        return root
