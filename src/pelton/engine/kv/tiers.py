"""`KVTiers`: host memory behind the device's KV cache, and what moves between the two.

Content is found under the same keys in every tier, so eviction and swapping are one thing: what leaves
the device goes to host memory (`KVOpKind.STORE`), and what a request finds there comes back (`LOAD`).
A copy stays in host memory, so that content which is evicted again costs no second copy.

A host block is held from the moment an operation names it until the step that carries the operation
has ended: its memory may be given to others (a disk, say) as soon as nobody holds it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from pelton.core.batch import BlockKey, KVOp, KVOpKind
from pelton.engine.kv.block import Block
from pelton.engine.kv.block_pool import BlockPool
from pelton.engine.kv.costs import KVCosts
from pelton.engine.kv.disk import DiskTier

HOST = "host"


@dataclass(slots=True)
class TierCounters:
    """Only grow."""

    num_stored_blocks: int = 0  # device to host
    num_loaded_blocks: int = 0  # host to device
    num_loaded_disk_blocks: int = 0  # of these, read from disk and not used since
    num_dropped_blocks: int = 0  # evicted from the device and not kept: host memory was busy


class KVTiers:
    def __init__(
        self, host: BlockPool, costs: KVCosts, *, num_block_bytes: int = 0, disk: DiskTier | None = None
    ) -> None:
        """`disk` is one behind the same host memory."""
        self.host = host
        self.disk = disk
        self.costs = costs
        costs.tiers = (HOST,)
        self.counters = TierCounters()
        self._num_block_bytes = num_block_bytes
        self.ops: list[KVOp] = []  # for the next batch, in order
        self._held: Counter[int] = Counter()  # host block -> operations under way that name it
        self._unsaved: OrderedDict[BlockKey, None] = OrderedDict()  # on the device, to be stored for the disk

    def find(self, key: BlockKey) -> int | None:
        """The host block with this content."""
        return self.host.find(key)

    def pays_to_load(self, num_blocks: int, start: int, end: int) -> bool:
        """Whether copying so many blocks is faster than computing positions [start, end)."""
        copy_s = self.costs.copies_from(HOST).copy_s(num_blocks * self._num_block_bytes)
        return copy_s < self.costs.recompute_s(start, end)

    def store(self, block: Block) -> None:
        """Copy a device block's content to host memory, unless it is there."""
        assert block.key is not None
        self._unsaved.pop(block.key, None)
        slot_id = self.host.find(block.key)
        if slot_id is not None:
            self._touch(slot_id, block)
            return
        taken = self.host.try_allocate(1)
        if taken is None:
            self.counters.num_dropped_blocks += 1
            return
        self.host.publish_like(taken[0], block)
        self._hold(KVOp(KVOpKind.STORE, block.block_id, taken[0], HOST), taken[0])
        self.counters.num_stored_blocks += 1

    def _touch(self, slot_id: int, block: Block) -> None:
        self.host.share((slot_id,))
        self.host.blocks[slot_id].num_turns = block.num_turns
        self.host.release((slot_id,))

    def hold(self, slot_ids: Sequence[int]) -> None:
        """Keep host blocks that are about to be loaded, while room is made on the device."""
        self.host.share(slot_ids)

    def load(self, slot_id: int, block_id: int) -> None:
        """Copy a held host block to the device."""
        self._hold(KVOp(KVOpKind.LOAD, slot_id, block_id, HOST), slot_id)
        self.counters.num_loaded_blocks += 1
        if self.disk is not None and slot_id in self.disk.unused_slot_ids:
            self.disk.unused_slot_ids.remove(slot_id)
            self.counters.num_loaded_disk_blocks += 1

    def _hold(self, op: KVOp, slot_id: int) -> None:
        self.ops.append(op)
        self._held[slot_id] += 1

    def note_cached(self, block: Block) -> None:
        """A device block was given back: with a disk, its content is to outlive the process."""
        assert block.key is not None
        if self.disk is not None and self.disk.wants(block.key):
            self._unsaved[block.key] = None

    def save(self, device: BlockPool, num_blocks: int) -> None:
        """Store up to `num_blocks` that the disk does not have, as long as it keeps up."""
        if self.disk is None or self.disk.is_behind:
            return
        while self._unsaved and num_blocks:
            key, _ = self._unsaved.popitem()  # given back last: a chain's beginning, without which the rest is nothing
            block_id = device.find(key)
            if block_id is not None and self.disk.wants(key):
                self.store(device.blocks[block_id])
                num_blocks -= 1

    def lose(self, ops: Sequence[KVOp]) -> None:
        """What these were to store is not there."""
        for op in ops:
            if op.tier == HOST and op.kind is KVOpKind.STORE:
                self.host.unpublish(op.destination)

    def complete(self, ops: Sequence[KVOp], elapsed_s: float) -> None:
        """The step that carried `ops` has ended; moving them took `elapsed_s`."""
        moved = [op.destination if op.kind is KVOpKind.STORE else op.source for op in ops if op.tier == HOST]
        for slot_id in moved:
            self._held[slot_id] -= 1
            if not self._held[slot_id]:
                del self._held[slot_id]
        self.host.release(moved)
        if moved:
            own_s = elapsed_s * len(moved) / len(ops)
            self.costs.copies_from(HOST).observe(len(moved) * self._num_block_bytes, own_s)

    def stats(self, block_size: int, num_groups: int) -> dict[str, int]:
        """Fields of `EngineStats`; a token has a place in a block of every group."""
        stats = {
            "num_host_blocks": self.host.num_total,
            "num_host_blocks_cached": self.host.num_cached,
            "num_host_hit_tokens_total": self.counters.num_loaded_blocks * block_size // num_groups,
            "num_disk_hit_tokens_total": self.counters.num_loaded_disk_blocks * block_size // num_groups,
            "num_tier_stored_blocks_total": self.counters.num_stored_blocks,
            "num_tier_loaded_blocks_total": self.counters.num_loaded_blocks,
            "num_tier_dropped_blocks_total": self.counters.num_dropped_blocks,
        }
        if self.disk is not None:
            counters = self.disk.counters
            stats |= {
                "num_disk_blocks": self.disk.num_blocks,
                "num_disk_written_blocks_total": counters.num_written_blocks,
                "num_disk_read_blocks_total": counters.num_read_blocks,
                "num_disk_failed_writes_total": counters.num_failed_writes,
                "num_disk_failed_reads_total": counters.num_failed_reads,
            }
        return stats

    def check(self) -> None:
        """Assert that host blocks are held by what is under way and by nothing else. For tests."""
        moving = self.disk.held_slot_ids() if self.disk is not None else []
        self.host.check([list(self._held.elements()), moving])
