"""Blocks by NVIDIA's NIXL, an optional package: one-sided reads over UCX, from host or device memory, here or over a
network. Only host memory has been tried.

A read that does not end in time cannot be recalled, so it goes to memory of its link, never to an inbox slot that
may be another block's by then. That memory lives until the process ends where a read was given up.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import msgspec
import numpy as np

from pelton.cluster.transfer.checksum import beside_steps
from pelton.cluster.transfer.mover import MoverSize, TransferError
from pelton.core.errors import ConfigError

READ_S = 5.0
_POLL_S = 20e-6
_BOUNCE_BLOCKS = 16
_BACKEND = "UCX"


class _Description(msgspec.Struct, frozen=True):
    metadata: bytes
    address: int
    memory_type: str
    device_id: int


class NixlMover:
    """Implements `Mover`."""

    def __init__(self, size: MoverSize, device: str) -> None:
        """Raises `ConfigError` where NIXL is missing, or does not start."""
        if find_spec("nixl") is None:
            raise ConfigError("kv_connector is nixl, which is not installed: pip install 'pelton[nixl]'")
        self._size = size
        self._is_on_device = device != "cpu"
        self.inbox: Any = self._empty(size.num_inbox_slots)
        self.outbox: Any = self._empty(size.num_outbox_slots)
        self._lock = threading.Lock()  # around all calls of the agent
        self._num_links: Counter[str] = Counter()  # to each other agent
        self._given_up: list[tuple[Any, Any]] = []  # reads that may still write, with their memory
        try:
            api: Any = import_module("nixl._api")
            self._agent: Any = api.nixl_agent(uuid.uuid4().hex, api.nixl_agent_config(backends=[_BACKEND]))
            if size.num_outbox_slots:
                self.register(self.outbox)
        except Exception as error:  # NIXL's own types of errors are not public
            raise ConfigError(f"kv_connector is nixl, which does not start: {error}") from error

    def _empty(self, num_slots: int) -> Any:
        if not self._is_on_device:
            return np.zeros((num_slots, self._size.block_bytes), dtype=np.uint8)
        import torch

        return torch.empty((num_slots, self._size.block_bytes), dtype=torch.uint8, device="cuda")

    @property
    def memory_type(self) -> str:
        return "VRAM" if self._is_on_device else "DRAM"

    def register(self, slots: Any) -> Any:
        """What `forget` gives up again."""
        region = (_address(slots), len(slots) * self._size.block_bytes, _device_id(slots), "")
        with self._lock:
            return self._agent.register_memory([region], self.memory_type)

    def describe(self) -> tuple[bytes, tuple[int, ...]]:
        with self._lock:
            metadata = self._agent.get_agent_metadata()
        description = _Description(metadata, _address(self.outbox), self.memory_type, _device_id(self.outbox))
        return msgspec.msgpack.encode(description), ()

    def open(self, description: bytes, files: Sequence[int], num_slots: int) -> NixlOutbox:
        del files, num_slots  # it has none; slots are looked at before they are read
        try:
            found = msgspec.msgpack.decode(description, type=_Description)
        except msgspec.DecodeError as error:
            raise TransferError(f"what describes its memory cannot be read: {error}") from error
        bounce, registered = self._empty(_BOUNCE_BLOCKS), None
        try:
            registered = self.register(bounce)
            with self._lock:
                name = self._agent.add_remote_agent(found.metadata)
                self._num_links[name] += 1
        except Exception as error:
            if registered is not None:  # of memory that is about to be freed
                with self._lock, contextlib.suppress(Exception):
                    self._agent.deregister_memory(registered)
            raise TransferError(f"NIXL does not connect: {error}") from error
        return NixlOutbox(self, name, found, (bounce, registered))

    def read(self, remote_name: str, remote: _Description, slot_ids: Sequence[int], bounce: Any) -> None:
        """Slots of another engine into the first blocks of `bounce`. Raises `TransferError`."""
        size = self._size.block_bytes
        own = [(_address(bounce) + index * size, size, _device_id(bounce)) for index in range(len(slot_ids))]
        theirs = [(remote.address + slot_id * size, size, remote.device_id) for slot_id in slot_ids]
        agent, until_s = self._agent, time.monotonic() + READ_S
        try:
            with self._lock:
                handle = agent.initialize_xfer(
                    "READ",
                    agent.get_xfer_descs(own, self.memory_type),
                    agent.get_xfer_descs(theirs, remote.memory_type),
                    remote_name,
                )
                state = agent.transfer(handle)
            while state == "PROC":
                if time.monotonic() > until_s:
                    self._given_up.append((handle, bounce))
                    raise TransferError(f"NIXL has not read its blocks in {READ_S:.0f} s")
                time.sleep(_POLL_S)
                with self._lock:
                    state = agent.check_xfer_state(handle)
            with self._lock:
                agent.release_xfer_handle(handle)
        except TransferError:
            raise
        except Exception as error:
            raise TransferError(f"NIXL cannot read its blocks: {error}") from error
        if state != "DONE":
            raise TransferError(f"NIXL cannot read its blocks: the transfer's state is {state}")

    def forget(self, remote_name: str, bounce: Any, registered: Any) -> None:
        with self._lock, contextlib.suppress(Exception):
            self._num_links[remote_name] -= 1
            if not self._num_links[remote_name]:
                self._agent.remove_remote_agent(remote_name)
            if all(other is not bounce for _, other in self._given_up):
                self._agent.deregister_memory(registered)

    def close(self) -> None:
        """The agent frees what it has registered."""
        with self._lock:
            self._agent = None


class NixlOutbox:
    """Implements `RemoteOutbox`."""

    def __init__(self, mover: NixlMover, name: str, remote: _Description, bounce: tuple[Any, Any]) -> None:
        """`bounce`: memory that reads go to, and its registration."""
        self._mover = mover
        self._name = name
        self._remote = remote
        self._bounce, self._registered = bounce

    def read(self, slot_ids: Sequence[int], inbox_ids: Sequence[int]) -> None:
        for low in range(0, len(slot_ids), len(self._bounce)):
            here = slot_ids[low : low + len(self._bounce)]
            self._mover.read(self._name, self._remote, here, self._bounce)
            with beside_steps(self._bounce):  # which the next read writes over
                for index, inbox_id in enumerate(inbox_ids[low : low + len(here)]):
                    self._mover.inbox[inbox_id][:] = self._bounce[index]

    def close(self) -> None:
        self._mover.forget(self._name, self._bounce, self._registered)


def _address(slots: Any) -> int:
    address: int = slots.ctypes.data if isinstance(slots, np.ndarray) else slots.data_ptr()
    return address


def _device_id(slots: Any) -> int:
    return 0 if isinstance(slots, np.ndarray) else int(slots.device.index or 0)
