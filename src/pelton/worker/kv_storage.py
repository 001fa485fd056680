"""`KVStorage`: the memory of all KV blocks. Bookkeeping of blocks is the engine's, not done here."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from typing import Any

from pelton.core.batch import KVOp, KVOpKind
from pelton.core.errors import EngineStepError
from pelton.core.model_spec import ModelSpec
from pelton.worker.kernels.block_copies import RunningCopies
from pelton.worker.kernels.ops import Kernels, LayerCache
from pelton.worker.kv_format import KV_FORMATS

_BYTES_AHEAD = 128 * 2**20
_IDLE = 19  # the lowest priority


class KVStorage:
    """One pool for all KV groups: a block id is used by one group at a time, for all its layers.

    Memory is reserved on construction, but touched (so really taken) only as blocks are written; what
    an unwritten block holds is undefined. Block 0 is the null block, which no request writes or reads.
    """

    def __init__(
        self,
        spec: ModelSpec,
        num_blocks: int,
        block_size: int,
        dtype: str,
        kernels: Kernels,
        *,
        num_host_blocks: int = 0,
    ) -> None:
        """`num_host_blocks` more lie in host memory, for blocks that leave the cache. Raises MemoryError where
        there is not that much."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._places = {
            layer_id: (group_id, slot)
            for group_id, group in enumerate(spec.kv_groups)
            for slot, layer_id in enumerate(group.layer_ids)
        }
        # [layer slots, keys and values, num_blocks, *block]: block_size, K, D, or bytes of a packed format
        kv_format = KV_FORMATS[dtype]
        block_shape = kv_format.block_shape(block_size, spec.num_kv_heads, spec.head_dim)
        self._kernels = kernels
        self._data = kernels.empty_cache(
            (spec.num_layers_per_kv_group, 2, num_blocks, *block_shape), kv_format.array_dtype
        )

        self._copies = kernels.make_block_copies()
        self._host_bytes = self._copies.empty_host(num_host_blocks, self._data.nbytes // num_blocks)
        self._tiers: dict[str, Any] = {"host": self._host_bytes}

        self._num_ahead = max(1, _BYTES_AHEAD * num_blocks // max(1, self._data.nbytes))
        self._num_taken = 0
        self._taker: threading.Thread | None = None

    def take_ahead(self, last_block: int) -> threading.Thread | None:
        """Have memory for blocks behind `last_block`, the highest in use, taken in the background while there is time:
        where a machine must first get or clear it, 512 tokens would wait 20 ms for it. Returns the thread that does it,
        if one is needed. Not to be called by two threads."""
        is_enough = last_block + self._num_ahead // 2 < self._num_taken or self._num_taken == self.num_blocks
        if is_enough or (self._taker is not None and self._taker.is_alive()):
            return None
        end = min(self.num_blocks, last_block + 1 + self._num_ahead)
        self._taker = threading.Thread(
            target=_take_pages,
            args=(self._kernels, self._data, self._num_taken, end),
            name="pelton-kv-pages",
            daemon=True,
        )
        self._num_taken = end
        self._taker.start()
        return self._taker

    @property
    def num_bytes(self) -> int:
        return int(self._data.nbytes)

    def layer_cache(self, layer_id: int) -> LayerCache:
        """Its group is an index into `ForwardBatch.groups` and `ModelSpec.kv_groups`."""
        group_id, slot = self._places[layer_id]
        return LayerCache(group_id, *self._data[slot])

    def layer_caches(self) -> list[LayerCache]:
        return [self.layer_cache(layer_id) for layer_id in sorted(self._places)]

    def host_block(self, slot_id: int) -> memoryview:
        """The bytes of a block in host memory, to read and to write."""
        return self._host_bytes[slot_id].data

    def add_tier(self, name: str, slots: Any) -> None:
        """Let operations name another tier: bytes [num_slots, block_bytes], a numpy array or one of the device."""
        self._tiers[name] = slots

    def move(self, ops: Iterable[KVOp]) -> RunningCopies:
        """Copy blocks, in every layer, one operation after another. Host memory is right once they are waited for."""
        for op in ops:
            if op.kind is KVOpKind.COPY:
                self._copies.copy(self._data[:, :, op.destination], self._data[:, :, op.source])
            elif (slots := self._tiers.get(op.tier)) is None:
                raise EngineStepError(f"KV operation {op.kind} needs tier {op.tier!r}, and this worker has none")
            elif op.kind is KVOpKind.STORE:
                self._copies.store(slots[op.destination], self._data[:, :, op.source])
            else:
                self._copies.load(self._data[:, :, op.destination], slots[op.source])
        return self._copies.take_running()


def _take_pages(kernels: Kernels, data: Any, start: int, end: int) -> None:
    """Of blocks [start, end) of every layer. The first is part of a first token, the others can wait."""
    if start == 0:
        _take_pages_of(kernels, data, 0, 1)
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _IDLE)
    _take_pages_of(kernels, data, start, end)


def _take_pages_of(kernels: Kernels, data: Any, start: int, end: int) -> None:
    for layer in data:
        for values in layer:
            kernels.take_pages(values[start:end])
