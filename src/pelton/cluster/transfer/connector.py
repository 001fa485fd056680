"""`PeerConnector`: asks peers for blocks and is asked by others; which memory they pass through is the mover's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pelton.cluster.config import TransferConfig
from pelton.cluster.transfer.mover import Mover, MoverSize
from pelton.cluster.transfer.outlet import Outlet
from pelton.cluster.transfer.peer import Peer
from pelton.cluster.transfer.wire import VERSION, Hello
from pelton.core.batch import BlockKey
from pelton.core.errors import ConfigError
from pelton.core.events import EngineInfo
from pelton.core.protocols import BlockRead, WantedBlocks

# While one batch of blocks is read, the step that copies another one runs at the other engine.
NUM_READERS = 2


def size_of(config: TransferConfig, info: EngineInfo) -> MoverSize:
    """Raises `ConfigError` where no block fits."""
    num_slots = int(config.kv_transfer_gb * 2**30) // info.kv_block_bytes
    if not num_slots:
        raise ConfigError(
            f"kv_transfer_gb is {config.kv_transfer_gb}, too little for one KV block of {info.kv_block_bytes} bytes"
        )
    return MoverSize(num_slots if config.kv_peers else 0, num_slots if config.kv_listen else 0, info.kv_block_bytes)


class PeerConnector:
    """Implements `core.protocols.KVConnector`."""

    def __init__(self, config: TransferConfig, info: EngineInfo, mover: Mover) -> None:
        """Raises `ConfigError` where nobody can listen at the address."""
        identity = hashlib.blake2b(info.kv_identity.encode(), digest_size=16).digest()
        hello = Hello(VERSION, config.kv_connector, identity, info.kv_block_bytes)
        self._mover = mover
        self._outlet = Outlet(config.kv_listen, hello, mover) if config.kv_listen is not None else None
        self._peers = [Peer(address, hello, mover) for address in config.kv_peers]
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="pelton-kv-receive")

    @property
    def inbox(self) -> Any:
        return self._mover.inbox

    @property
    def outbox(self) -> Any:
        return self._mover.outbox

    @property
    def can_fetch(self) -> bool:
        return any(not peer.is_paused for peer in self._peers)

    def fetch(self, slot_ids: Sequence[int], keys: Sequence[BlockKey]) -> Future[BlockRead]:
        return self._readers.submit(self._fetch, slot_ids, keys)

    def _fetch(self, slot_ids: Sequence[int], keys: Sequence[BlockKey]) -> BlockRead:
        """From the first peer as much as it has, the rest from the next. What is timed is the reading: answers wait for
        a step of the other engine, however few or many blocks there are."""
        num_loaded, read_s = 0, 0.0
        for peer in self._peers:
            if num_loaded < len(keys) and not peer.is_paused:
                number, elapsed_s = peer.fetch(slot_ids[num_loaded:], keys[num_loaded:])
                num_loaded += number
                read_s += elapsed_s
        loaded = (True,) * num_loaded + (False,) * (len(keys) - num_loaded)
        return BlockRead(loaded, read_s)

    def take_wanted(self) -> list[WantedBlocks]:
        return self._outlet.take_wanted() if self._outlet is not None else []

    def wake_with(self, wake: Callable[[], None]) -> None:
        if self._outlet is not None:
            self._outlet.wake = wake
            wake()  # somebody may have asked already

    def close(self) -> None:
        if self._outlet is not None:
            self._outlet.close()
        for peer in self._peers:
            peer.interrupt()
        self._readers.shutdown(cancel_futures=True)
        for peer in self._peers:
            peer.close()
        self._mover.close()
