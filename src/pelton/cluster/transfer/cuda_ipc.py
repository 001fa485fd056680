"""Blocks in device memory, read by other processes of the host through handles of the CUDA driver.

https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEM.html, cuIpc*. Memory is allocated by the driver and not
by torch, whose allocator cuts one allocation into many tensors: a handle is of a whole allocation. Unproven: no GPU
was at hand.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from pelton.cluster.transfer.mover import MoverSize, TransferError
from pelton.core.errors import ConfigError

HANDLE_BYTES = 64
_DESCRIPTION = struct.Struct("<64sQq")
_LAZY_ENABLE_PEER_ACCESS = 1
_NON_BLOCKING = 1


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle, which the driver takes by value."""

    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


class Description(NamedTuple):
    handle: bytes
    num_bytes: int
    process_id: int

    def encode(self) -> bytes:
        return _DESCRIPTION.pack(*self)


class CudaError(Exception):
    """The driver refused a call."""


class CudaDriver:
    """The few calls of the CUDA driver that are needed, each on the device's primary context, which torch uses too."""

    def __init__(self, library: str = "libcuda.so.1", device_id: int = 0) -> None:
        """Raises `ConfigError` where there is no driver, or no such device."""
        try:
            self._calls = ctypes.CDLL(library)
        except OSError as error:
            raise ConfigError(f"kv_connector is cuda_ipc, which needs an NVIDIA driver: {error}") from error
        self._context = ctypes.c_void_p()
        device = ctypes.c_int()
        try:
            self._call("cuInit", 0)
            self._call("cuDeviceGet", ctypes.byref(device), device_id)
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        except CudaError as error:
            raise ConfigError(f"kv_connector is cuda_ipc, but the device cannot be used: {error}") from error

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._calls, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._calls.cuGetErrorString(status, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")

    def _call_here(self, name: str, *arguments: Any) -> None:
        self._call("cuCtxSetCurrent", self._context)  # of this thread
        self._call(name, *arguments)

    def allocate(self, num_bytes: int) -> int:
        pointer = ctypes.c_uint64()
        self._call_here("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(num_bytes))
        return pointer.value

    def free(self, pointer: int) -> None:
        self._call_here("cuMemFree_v2", ctypes.c_uint64(pointer))

    def share(self, pointer: int) -> bytes:
        handle = IpcHandle()
        self._call_here("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(pointer))
        return bytes(handle.reserved)

    def open(self, handle: bytes) -> int:
        """Another process's memory. Opened twice it is counted, and closed with the last `close`."""
        pointer = ctypes.c_uint64()
        own = IpcHandle((ctypes.c_ubyte * HANDLE_BYTES)(*handle))
        self._call_here("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), own, ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS))
        return pointer.value

    def close(self, pointer: int) -> None:
        self._call_here("cuIpcCloseMemHandle", ctypes.c_uint64(pointer))

    def make_stream(self) -> int:
        stream = ctypes.c_void_p()
        self._call_here("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        return stream.value or 0

    def free_stream(self, stream: int) -> None:
        self._call_here("cuStreamDestroy_v2", ctypes.c_void_p(stream))

    def copy(self, destination: int, source: int, num_bytes: int, stream: int) -> None:
        """Between addresses of devices, beside what torch runs; see `wait`."""
        self._call_here(
            "cuMemcpyDtoDAsync_v2",
            ctypes.c_uint64(destination),
            ctypes.c_uint64(source),
            ctypes.c_size_t(num_bytes),
            ctypes.c_void_p(stream),
        )

    def wait(self, stream: int) -> None:
        self._call_here("cuStreamSynchronize", ctypes.c_void_p(stream))

    def tensor(self, pointer: int, shape: tuple[int, int]) -> Any:
        """Memory as torch sees it: uint8, without a copy."""
        import torch

        return torch.as_tensor(_DeviceArray(pointer, shape), device="cuda")


class _DeviceArray:
    """https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html"""

    def __init__(self, pointer: int, shape: tuple[int, int]) -> None:
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "|u1", "data": (pointer, False), "version": 3}


class CudaIpcMover:
    """Implements `Mover`."""

    def __init__(self, size: MoverSize, device: str, driver: CudaDriver | None = None) -> None:
        """Raises `ConfigError` on a CPU, and where the device has no memory left."""
        if device == "cpu":
            raise ConfigError("kv_connector is cuda_ipc, but the model runs on a CPU: use shared_memory")
        self._driver = driver or CudaDriver()
        self._block_bytes = size.block_bytes
        self._pointers: list[int] = []
        self.inbox: Any = self._allocate(size.num_inbox_slots)
        self.outbox: Any = self._allocate(size.num_outbox_slots)
        self._description = b""
        if size.num_outbox_slots:
            handle = self._driver.share(self._pointers[-1])
            num_bytes = size.num_outbox_slots * size.block_bytes
            self._description = Description(handle, num_bytes, os.getpid()).encode()

    def _allocate(self, num_slots: int) -> Any:
        import torch

        if not num_slots:
            return torch.empty((0, self._block_bytes), dtype=torch.uint8)
        try:
            pointer = self._driver.allocate(num_slots * self._block_bytes)
        except CudaError as error:
            self.close()
            raise ConfigError(f"kv_transfer_gb: {num_slots} KV blocks of device memory: {error}") from error
        self._pointers.append(pointer)
        return self._driver.tensor(pointer, (num_slots, self._block_bytes))

    def describe(self) -> tuple[bytes, tuple[int, ...]]:
        return self._description, ()

    def open(self, description: bytes, files: Sequence[int], num_slots: int) -> MappedOutbox:
        for file in files:  # it should have none
            os.close(file)
        found = decode(description)
        if found.num_bytes != num_slots * self._block_bytes:
            raise TransferError("its device memory is not what it says")
        if found.process_id == os.getpid():
            raise TransferError("CUDA shares no memory within one process: use shared_memory")
        try:
            return MappedOutbox(self._driver, found.handle, self.inbox)
        except CudaError as error:
            raise TransferError(f"its device memory cannot be mapped: {error}") from error

    def close(self) -> None:
        while self._pointers:
            self._driver.free(self._pointers.pop())


def decode(description: bytes) -> Description:
    """Raises `TransferError` for what is none."""
    if len(description) != _DESCRIPTION.size:
        raise TransferError(f"its device memory is described in {len(description)} bytes, not {_DESCRIPTION.size}")
    return Description(*_DESCRIPTION.unpack(description))


class MappedOutbox:
    """Implements `RemoteOutbox`."""

    def __init__(self, driver: CudaDriver, handle: bytes, inbox: Any) -> None:
        self._driver = driver
        self._inbox = inbox
        self._pointer = driver.open(handle)
        try:
            self._stream = driver.make_stream()
        except CudaError:
            driver.close(self._pointer)
            raise

    def read(self, slot_ids: Sequence[int], inbox_ids: Sequence[int]) -> None:
        size = self._inbox.shape[1]
        try:
            for slot_id, inbox_id in zip(slot_ids, inbox_ids, strict=True):
                destination = self._inbox.data_ptr() + inbox_id * size
                self._driver.copy(destination, self._pointer + slot_id * size, size, self._stream)
            self._driver.wait(self._stream)
        except CudaError as error:
            with contextlib.suppress(CudaError):
                self._driver.wait(self._stream)  # nothing may come later: the slots will be other blocks'
            raise TransferError(f"its device memory cannot be read: {error}") from error

    def close(self) -> None:
        with contextlib.suppress(CudaError):  # its process has ended
            self._driver.close(self._pointer)
        with contextlib.suppress(CudaError):
            self._driver.free_stream(self._stream)
