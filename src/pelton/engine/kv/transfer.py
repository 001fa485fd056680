"""`KVTransfer`: blocks that come from other engines, and go to them. Bookkeeping only; a `KVConnector` has the bytes.

A block is known by its key everywhere (law 5). What another engine asks for is copied into an outbox slot by
an operation of the next step, and read from there; what it sends lands in an inbox slot, and a step copies it into
a block of the cache, where a prefix match finds it. Operations are done in order, so neither needs to know what else
happens to a block meanwhile.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from itertools import compress

from pelton.core.batch import INBOX, OUTBOX, BlockKey, KVOp, KVOpKind
from pelton.core.protocols import BlockRead, KVConnector, WantedBlocks
from pelton.engine.kv.block_pool import BlockPool
from pelton.engine.kv.costs import KVCosts
from pelton.engine.kv.tiers import KVTiers

PEER = "peer"  # the name of a copy from another engine's memory in `KVCosts`
# Blocks that are asked for at once: enough to measure a speed, few enough for steps to copy some while others travel.
FETCH_BLOCKS = 16


@dataclass(slots=True)
class TransferCounters:
    """Only grow."""

    num_received_blocks: int = 0
    num_failed_blocks: int = 0  # asked for and not had: the other engine lacks them, is gone, or they were damaged
    num_dropped_blocks: int = 0  # received, but the cache had no room
    num_sent_blocks: int = 0  # copied for others to read


@dataclass(slots=True)
class _Offer:
    wanted: WantedBlocks
    slot_ids: tuple[int, ...]
    num_missing: int  # slots that no step has written yet
    is_lost: bool = False  # a step that was to write one failed


@dataclass(slots=True)
class _Slots:
    """The free ones of an inbox or outbox, and how many there are."""

    num_total: int
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.free = list(range(self.num_total - 1, -1, -1))


class KVTransfer:
    def __init__(
        self,
        connector: KVConnector,
        pool: BlockPool,
        tiers: KVTiers | None,
        ops: list[KVOp],
        costs: KVCosts,
        *,
        num_block_bytes: int = 0,
    ) -> None:
        """`ops` are the operations of the next batch, shared with the KV manager."""
        self.counters = TransferCounters()
        self.costs = costs
        self._connector = connector
        self._pool = pool
        self._tiers = tiers
        self._ops = ops
        self._num_block_bytes = num_block_bytes
        self._inbox = _Slots(len(connector.inbox))
        self._outbox = _Slots(len(connector.outbox))
        self._fetching: dict[BlockKey, int] = {}  # -> inbox slot
        self._landing: set[int] = set()  # inbox slots that a step copies from
        self._asked: deque[WantedBlocks] = deque()
        self._offers: dict[int, _Offer] = {}  # by outbox slot
        self._done: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake: Callable[[], None] = lambda: None
        self.on_missed: Callable[[Sequence[BlockKey]], None] = lambda _: None  # called with what did not come

    def wake_with(self, wake: Callable[[], None]) -> None:
        """`wake` is called, on threads of the connector, when `poll` has work."""
        self._wake = wake
        self._connector.wake_with(wake)

    def poll(self) -> None:
        """Take what the connector has done, and what others ask for, since the last call."""
        while True:
            try:
                settle = self._done.get_nowait()
            except queue.Empty:
                break
            settle()
        self._asked += self._connector.take_wanted()
        while self._asked and self._try_offer(self._asked[0]):
            self._asked.popleft()

    def _tell(self, settle: Callable[[], None]) -> None:
        self._done.put(settle)
        self._wake()

    # -- from others --------------------------------------------------------------------------------

    @property
    def can_fetch(self) -> bool:
        return self._inbox.num_total > 0 and self._connector.can_fetch

    @property
    def has_room(self) -> bool:
        """Whether more can be asked for."""
        return bool(self._inbox.free)

    def is_fetching(self, key: BlockKey) -> bool:
        return key in self._fetching

    def fetch(self, places: Mapping[BlockKey, int]) -> None:
        """Ask for blocks, those first that come first, as far as the inbox has room. `places` as in `DiskTier.read`."""
        wanted = [key for key in places if key not in self._fetching and self._pool.find(key) is None]
        for low in range(0, len(wanted), FETCH_BLOCKS):
            batch = wanted[low : low + FETCH_BLOCKS][: len(self._inbox.free)]
            if not batch:
                return
            slot_ids = [self._inbox.free.pop() for _ in batch]
            self._fetching.update(zip(batch, slot_ids, strict=True))
            future = self._connector.fetch(slot_ids, batch)
            future.add_done_callback(lambda done, batch=batch: self._tell(lambda: self._fetched(batch, places, done)))  # type: ignore[misc]

    def _fetched(self, keys: Sequence[BlockKey], places: Mapping[BlockKey, int], future: Future[BlockRead]) -> None:
        try:
            result = future.result()
        except CancelledError:  # the connector was closed first
            result = BlockRead((False,) * len(keys), 0.0)
        self.costs.copies_from(PEER).observe(sum(result.loaded) * self._num_block_bytes, result.elapsed_s)
        self.counters.num_received_blocks += sum(result.loaded)
        self.counters.num_failed_blocks += len(keys) - sum(result.loaded)
        slot_ids = {key: self._fetching.pop(key) for key in keys}
        loaded = [key for key in compress(keys, result.loaded) if self._pool.find(key) is None]
        landing = loaded[: self._pool.num_available]
        self.counters.num_dropped_blocks += len(loaded) - len(landing)
        # Last one first: what a chain begins with is given up last.
        for key in reversed(landing):
            self._land(slot_ids.pop(key), key, places[key])
        self._inbox.free += slot_ids.values()
        missed = [key for key in keys if self._pool.find(key) is None]
        if missed:
            self.on_missed(missed)

    def _land(self, slot_id: int, key: BlockKey, place: int) -> None:
        """Have the next step copy a slot into the cache."""
        taken = self._pool.try_allocate(1)
        assert taken is not None
        self._pool.publish(taken[0], key, place)
        self._ops.append(KVOp(KVOpKind.LOAD, slot_id, taken[0], INBOX))
        self._landing.add(slot_id)
        self._pool.release(taken)

    # -- to others ----------------------------------------------------------------------------------

    def _try_offer(self, wanted: WantedBlocks) -> bool:
        """Have the next step copy what there is; False: it has to wait for a slot."""
        if wanted.taken.done():
            return True
        slot_ids: list[int] = []
        for key in wanted.keys:
            if not slot_ids and not self._outbox.free and self._is_here(key):
                return False
            block_id = self._try_find(key) if self._outbox.free else None
            if block_id is None:
                break
            slot_ids.append(self._outbox.free.pop())
            self._ops.append(KVOp(KVOpKind.STORE, block_id, slot_ids[-1], OUTBOX))
        if not slot_ids:
            wanted.offer.set_result(())
            return True
        offer = _Offer(wanted, tuple(slot_ids), len(slot_ids))
        self._offers.update((slot_id, offer) for slot_id in slot_ids)
        self.counters.num_sent_blocks += len(slot_ids)
        return True

    def _is_here(self, key: BlockKey) -> bool:
        return self._pool.find(key) is not None or (self._tiers is not None and self._tiers.find(key) is not None)

    def _try_find(self, key: BlockKey) -> int | None:
        """The block of the cache with this content, brought back from host memory where it was evicted to that."""
        block_id = self._pool.find(key)
        if block_id is not None or self._tiers is None:
            return block_id
        slot_id = self._tiers.find(key)
        if slot_id is None:
            return None
        self._tiers.hold((slot_id,))  # before room is made, which evicts to the host
        taken = self._pool.try_allocate(1)
        if taken is None:
            self._tiers.host.release((slot_id,))
            return None
        self._tiers.load(slot_id, taken[0])
        self._pool.publish_like(taken[0], self._tiers.host.blocks[slot_id])
        self._pool.release(taken)
        return taken[0]

    def _free_offer(self, offer: _Offer) -> None:
        for slot_id in offer.slot_ids:
            del self._offers[slot_id]
        self._outbox.free += offer.slot_ids

    # -- steps --------------------------------------------------------------------------------------

    def lose(self, ops: Sequence[KVOp]) -> None:
        """What these were to copy for others is not there: they are offered nothing."""
        for op in ops:
            if op.tier == OUTBOX:
                self._offers[op.destination].is_lost = True

    def complete(self, ops: Sequence[KVOp]) -> None:
        """The step that carried `ops` has ended."""
        for op in ops:
            if op.tier == INBOX:
                self._landing.remove(op.source)
                self._inbox.free.append(op.source)
            elif op.tier == OUTBOX:
                offer = self._offers[op.destination]
                offer.num_missing -= 1
                if offer.num_missing:
                    continue
                if offer.is_lost:
                    offer.wanted.offer.set_result(())
                    self._free_offer(offer)
                else:
                    offer.wanted.offer.set_result(offer.slot_ids)
                    offer.wanted.taken.add_done_callback(
                        lambda _, offer=offer: self._tell(lambda: self._free_offer(offer))  # type: ignore[misc]
                    )

    def stats(self) -> dict[str, int]:
        """Fields of `EngineStats`."""
        counters = self.counters
        return {
            "num_peer_received_blocks_total": counters.num_received_blocks,
            "num_peer_failed_blocks_total": counters.num_failed_blocks,
            "num_peer_dropped_blocks_total": counters.num_dropped_blocks,
            "num_peer_sent_blocks_total": counters.num_sent_blocks,
        }

    def check(self) -> None:
        """Assert that every slot is free or in one use. For tests."""
        inbox = [*self._inbox.free, *self._fetching.values(), *self._landing]
        assert sorted(inbox) == list(range(self._inbox.num_total)), "an inbox slot is lost, or in two uses"
        outbox = [*self._outbox.free, *self._offers]
        assert sorted(outbox) == list(range(self._outbox.num_total)), "an outbox slot is lost, or in two uses"
