"""`DiskTier`: which blocks are on disk, what is being written behind and read ahead. Bookkeeping only.

Blocks go from host memory to disk as soon as nobody holds them, and from disk to host memory when a new
request wants them (`read_ahead.py`). What the store's threads have done is taken by `poll`, once a turn.
"""

from __future__ import annotations

import queue
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import TypeVar

from pelton.core.batch import BlockKey
from pelton.core.protocols import BlockRead, BlockStore
from pelton.engine.kv.block import Block
from pelton.engine.kv.block_hash import is_private
from pelton.engine.kv.block_pool import BlockPool
from pelton.engine.kv.costs import KVCosts

_T = TypeVar("_T")

DISK = "disk"
# Blocks of one read: enough to measure a speed, few enough for both readers to have work.
READ_BLOCKS = 16


@dataclass(slots=True)
class DiskCounters:
    """Only grow."""

    num_written_blocks: int = 0
    num_read_blocks: int = 0
    num_failed_writes: int = 0
    num_failed_reads: int = 0  # missing, damaged or foreign


class DiskTier:
    def __init__(self, store: BlockStore, host: BlockPool, costs: KVCosts, *, max_bytes: int) -> None:
        self.counters = DiskCounters()
        self.on_done: Callable[[], None] = lambda: None  # called on the store's threads: `poll` has work
        self._store = store
        self._host = host
        self._costs = costs
        self._num_most = max(1, max_bytes // store.file_bytes)
        self._index: OrderedDict[BlockKey, None] = OrderedDict.fromkeys(store.scan(max_bytes))  # oldest first
        self._backlog: OrderedDict[BlockKey, None] = OrderedDict()  # to be written, oldest first
        self._failed: set[BlockKey] = set()  # not tried again before another write has gone well
        self._writing: dict[BlockKey, int] = {}  # -> host block, held
        self._reading: dict[BlockKey, int] = {}
        self.unused_slot_ids: set[int] = set()  # host blocks that were read and have not been loaded yet
        self._done: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # Each host block that is being moved is one that nobody else can use.
        self._most_writing = max(1, host.num_total // 4)
        self._most_reading = max(1, host.num_total // 2)
        self._give_up_oldest()
        host.on_cached = self.save
        host.on_evict = lambda block: self.unused_slot_ids.discard(block.block_id)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._index

    @property
    def num_blocks(self) -> int:
        return len(self._index)

    @property
    def is_behind(self) -> bool:
        """Whether more waits to be written than may be in writing."""
        return len(self._backlog) > self._most_writing

    def wants(self, key: BlockKey) -> bool:
        """Whether a block is worth writing: everybody's, and not there or on its way."""
        return not (is_private(key[1]) or key in self._index or key in self._writing or key in self._failed)

    def save(self, block: Block) -> None:
        """Write a host block's content behind."""
        assert block.key is not None
        if self.wants(block.key):
            self._backlog[block.key] = None
            self._write_more()

    def _write_more(self) -> None:
        while self._backlog and len(self._writing) < self._most_writing:
            key, _ = self._backlog.popitem(last=False)
            slot_id = self._host.find(key)
            if slot_id is None or not self.wants(key):  # evicted meanwhile, or written
                continue
            self._host.hold((slot_id,))
            self._writing[key] = slot_id
            future = self._store.store(slot_id, key)
            future.add_done_callback(lambda done, key=key: self._tell(lambda: self._written(key, done)))  # type: ignore[misc]

    def _written(self, key: BlockKey, future: Future[bool]) -> None:
        slot_id = self._writing.pop(key)
        if _result(future):
            self.counters.num_written_blocks += 1
            self._failed.clear()
            self._index[key] = None
            self._give_up_oldest()
        else:
            self.counters.num_failed_writes += 1
            self._failed.add(key)
        self._host.release((slot_id,))

    def _give_up_oldest(self) -> None:
        given_up = []
        while len(self._index) > self._num_most:
            given_up.append(self._index.popitem(last=False)[0])
        if given_up:
            self._store.remove(given_up)

    def is_reading(self, keys: Iterable[BlockKey]) -> bool:
        return any(key in self._reading for key in keys)

    def read(self, places: Mapping[BlockKey, int]) -> None:
        """Read blocks into host memory, those first that come first, as far as there is room.

        `places` are those of the blocks in their chain, which no file tells.
        """
        wanted = [key for key in places if key in self._index and key not in self._reading]
        for low in range(0, len(wanted), READ_BLOCKS):
            batch = wanted[low : low + READ_BLOCKS]
            if len(self._reading) + len(batch) > self._most_reading:
                return
            slot_ids = self._host.try_allocate(len(batch))
            if slot_ids is None:
                return
            self._reading.update(zip(batch, slot_ids, strict=True))
            future = self._store.load(slot_ids, batch)
            future.add_done_callback(lambda done, batch=batch: self._tell(lambda: self._read(batch, places, done)))  # type: ignore[misc]

    def _read(self, keys: Sequence[BlockKey], places: Mapping[BlockKey, int], future: Future[BlockRead]) -> None:
        result = _result(future)
        loaded = result.loaded if result else (False,) * len(keys)
        if result:
            self._costs.copies_from(DISK).observe(sum(loaded) * self._store.file_bytes, result.elapsed_s)
        # Last one first: what a chain begins with is given up last.
        for key, is_loaded in reversed(list(zip(keys, loaded, strict=True))):
            slot_id = self._reading.pop(key)
            if is_loaded:
                self.counters.num_read_blocks += 1
                self._host.publish(slot_id, key, places[key])
                self.unused_slot_ids.add(slot_id)
                if key in self._index:
                    self._index.move_to_end(key)
            else:
                self.counters.num_failed_reads += 1
                self._index.pop(key, None)
            self._host.release((slot_id,))

    def _tell(self, settle: Callable[[], None]) -> None:
        self._done.put(settle)
        self.on_done()

    def poll(self) -> None:
        """Take what the store has done since the last call."""
        while True:
            try:
                settle = self._done.get_nowait()
            except queue.Empty:
                break
            settle()
        self._write_more()

    def held_slot_ids(self) -> list[int]:
        """Host blocks that are being moved."""
        return [*self._writing.values(), *self._reading.values()]


def _result(future: Future[_T]) -> _T | None:
    """None where the store was closed first."""
    try:
        return future.result()
    except CancelledError:
        return None
