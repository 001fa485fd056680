"""`CudaCopies`: KV blocks between the device and pinned host memory, beside the steps."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pelton.worker.kernels.block_copies import Block, Bytes, CopyTimes, RunningCopies

_BLOCK = 2048
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by bytes of an element
_Times = list[tuple[torch.cuda.Event, torch.cuda.Event]]  # start and end of each copy, in their order


class CudaCopies:
    """Implements `BlockCopies`. Bytes travel on two streams of their own, from and to packed blocks on the device;
    the steps' stream packs and unpacks, and waits for nothing but what is loaded."""

    def __init__(self, device: torch.device) -> None:
        self._device = device  # threads have another one until they are told
        self._in = torch.cuda.Stream(device)
        self._out = torch.cuda.Stream(device)
        self._loads: _Times = []
        self._stores: _Times = []

    def empty_host(self, num_blocks: int, block_bytes: int) -> Bytes:
        """Pinned where it lies: torch's own pinned memory comes in powers of two, at worst twice what was asked for."""
        memory = torch.empty((num_blocks, block_bytes), dtype=torch.uint8)
        blocks: Bytes = memory.numpy()
        if not blocks.size:
            return blocks
        status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if not status:
            unpin = weakref.finalize(blocks, torch.cuda.cudart().cudaHostUnregister, memory.data_ptr())
            unpin.atexit = False  # the driver may be gone by then
            return blocks
        with suppress(RuntimeError):  # the runtime keeps what went wrong, and says it of the next kernel
            torch.zeros(1, device=self._device)
        try:  # some hosts pin nothing but what the driver has made
            return torch.empty((num_blocks, block_bytes), dtype=torch.uint8, pin_memory=True).numpy()
        except RuntimeError as error:
            problem = f"{memory.nbytes} bytes of host memory could not be pinned: CUDA error {status}, {error}"
            raise MemoryError(problem) from error

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        with self._on_device():
            copy_block(destination, source)

    def load(self, destination: Block, source: Bytes) -> None:
        steps = torch.cuda.current_stream(self._device)
        self._in.wait_stream(self._out)  # it may have been stored just now
        with torch.cuda.stream(self._in):
            packed = self._empty_like(destination)
            host = _as_tensor(source).view(destination.dtype).view(destination.shape)
            with _timed(self._loads, self._in):
                packed.copy_(host, non_blocking=True)
        steps.wait_stream(self._in)
        packed.record_stream(steps)
        self.copy(destination, packed)

    def store(self, destination: Bytes, source: Block) -> None:
        packed = self._empty_like(source)
        self.copy(packed, source)
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        packed.record_stream(self._out)
        with torch.cuda.stream(self._out):
            host = _as_tensor(destination).view(source.dtype).view(source.shape)
            with _timed(self._stores, self._out):
                host.copy_(packed, non_blocking=True)

    def _empty_like(self, block: Block) -> torch.Tensor:
        """Packed. On a full device there is room once the blocks before have arrived."""
        try:
            return torch.empty(block.shape, dtype=block.dtype, device=block.device)
        except torch.OutOfMemoryError:
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            return torch.empty(block.shape, dtype=block.dtype, device=block.device)

    def _on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def take_running(self) -> RunningCopies:
        running = CudaRunningCopies(self._loads, self._stores)
        self._loads, self._stores = [], []
        return running


@dataclass(frozen=True, slots=True)
class CudaRunningCopies:
    """Implements `RunningCopies`. Those of later steps may be behind them on their streams, and are not waited for."""

    loads: _Times
    stores: _Times

    def wait(self) -> CopyTimes:
        return CopyTimes(_wait_s(self.loads), _wait_s(self.stores))


def copy_block(destination: torch.Tensor, source: torch.Tensor) -> None:
    """Blocks [layer slots, 2, *block] whose last axes lie together. In one launch: torch makes one for each part of a
    pool whose offsets fit 32 bits, so dozens."""
    destination, source = (
        each.view(*each.shape[:2], -1).view(_WORDS[each.element_size()]) for each in (destination, source)
    )
    num_layers, _, size = destination.shape
    copy_block_kernel[(2 * num_layers, triton.cdiv(size, _BLOCK))](
        destination, source, *destination.stride()[:2], *source.stride()[:2], size, _BLOCK, num_warps=4
    )


@triton.jit
def copy_block_kernel(to_ptr, from_ptr, to_layer, to_half, from_layer, from_half, size, BLOCK: tl.constexpr):
    """Grid: keys and values of layer slots, parts of a block."""
    layer = (tl.program_id(0) // 2).to(tl.int64)
    half = (tl.program_id(0) % 2).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    values = tl.load(from_ptr + layer * from_layer + half * from_half + places, mask=mask)
    tl.store(to_ptr + layer * to_layer + half * to_half + places, values, mask=mask)


@contextmanager
def _timed(times: _Times, stream: torch.cuda.Stream) -> Iterator[None]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    yield
    end.record(stream)
    times.append((start, end))


def _wait_s(times: Sequence[tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
    if times:
        times[-1][1].synchronize()
    return float(sum(start.elapsed_time(end) for start, end in times)) / 1e3


def _as_tensor(slot: Bytes | torch.Tensor) -> torch.Tensor:
    """A slot of host memory, or one of the device that blocks pass through on their way to other engines."""
    return slot if isinstance(slot, torch.Tensor) else torch.from_numpy(slot)
