"""Connectors without engines, and a process that has blocks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pelton.cluster.config import TransferConfig
from pelton.cluster.transfer import open_connector, wire
from pelton.cluster.transfer.connector import PeerConnector
from pelton.core.batch import BlockKey
from tests.make import make_info

BLOCK_BYTES = 10_000  # two rows of a checksum and a rest
# The keys that a process has blocks of: those of group 0.
KEYS: list[BlockKey] = [(0, bytes([index]) * 16) for index in range(40)]
UNKNOWN: list[BlockKey] = [(1, b"?" * 16)]


def content(key: BlockKey) -> Any:
    """What a block holds; another one for each key."""
    return np.random.default_rng(key[1][0]).integers(0, 256, BLOCK_BYTES, dtype=np.uint8)


def make_connector(num_slots: int = 8, *, identity: str = "model", **settings: Any) -> PeerConnector:
    config = TransferConfig(kv_transfer_gb=(num_slots + 0.5) * BLOCK_BYTES / 2**30, **settings)
    device = "A GPU" if config.kv_connector == "cuda_ipc" else "cpu"
    return open_connector(config, make_info(kv_block_bytes=BLOCK_BYTES, kv_identity=identity, device=device))


def put(slots: Any, slot_id: int, block: Any) -> None:
    """Into a numpy array, or a tensor on the host."""
    np.asarray(slots[slot_id])[:] = block


def fetch(connector: PeerConnector, keys: Sequence[BlockKey]) -> tuple[bool, ...]:
    """Which of the blocks came; those that did are what they should be, in slots from the last one on."""
    slot_ids = range(len(connector.inbox) - 1, len(connector.inbox) - 1 - len(keys), -1)
    loaded = connector.fetch(list(slot_ids), keys).result(20).loaded
    for slot_id, key, is_loaded in zip(slot_ids, keys, loaded, strict=True):
        assert not is_loaded or (np.asarray(connector.inbox[slot_id]) == content(key)).all()
    return loaded


def wait_until(is_so: Callable[[], bool]) -> None:
    for _ in range(1000):
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that")


def hello() -> wire.Hello:
    identity = hashlib.blake2b(b"model", digest_size=16).digest()
    return wire.Hello(wire.VERSION, "shared_memory", identity, BLOCK_BYTES)


def wait_for_wanted(connector: PeerConnector) -> list[Any]:
    found: list[Any] = []
    wait_until(lambda: bool(found.extend(connector.take_wanted()) or found))
    return found


def frame(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data


@contextlib.contextmanager
def peer_process(path: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that listens at `path` and has all blocks; see `peer_process.py` for what goes wrong."""
    command = [sys.executable, "-m", "tests.cluster.peer_process", json.dumps({"path": str(path), **options})]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        while (line := process.stdout.readline()) != "ready\n":
            assert line, "the process did not start"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
