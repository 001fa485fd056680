"""`CudaCopies`: KV blocks between the device and pinned host memory, beside the steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pelton.worker.kernels.block_copies import Block, Bytes, CopyTimes


class CudaCopies:
    """Implements `BlockCopies`. Bytes travel on two streams of their own, from and to packed blocks on the device;
    the steps' stream packs and unpacks, and waits for nothing but what is loaded."""

    def __init__(self) -> None:
        self._in = torch.cuda.Stream()
        self._out = torch.cuda.Stream()
        self._timed: dict[torch.cuda.Stream, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {
            self._in: [],
            self._out: [],
        }

    def empty_host(self, num_blocks: int, block_bytes: int) -> Bytes:
        try:
            memory = torch.empty((num_blocks, block_bytes), dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise MemoryError(str(error)) from error
        return memory.numpy()

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        destination.copy_(source)

    def load(self, destination: Block, source: Bytes) -> None:
        steps = torch.cuda.current_stream()
        self._in.wait_stream(self._out)  # it may have been stored just now
        with torch.cuda.stream(self._in):
            packed = torch.empty(destination.shape, dtype=destination.dtype, device=destination.device)
            host = _as_tensor(source).view(destination.dtype).view(destination.shape)
            with self._timing(self._in):
                packed.copy_(host, non_blocking=True)
        steps.wait_stream(self._in)
        packed.record_stream(steps)
        destination.copy_(packed)

    def store(self, destination: Bytes, source: Block) -> None:
        packed = source.clone(memory_format=torch.contiguous_format)
        self._out.wait_stream(torch.cuda.current_stream())
        packed.record_stream(self._out)
        with torch.cuda.stream(self._out):
            host = _as_tensor(destination).view(source.dtype).view(source.shape)
            with self._timing(self._out):
                host.copy_(packed, non_blocking=True)

    def wait(self) -> CopyTimes:
        self._in.synchronize()
        self._out.synchronize()
        return CopyTimes(self._take_time_s(self._in), self._take_time_s(self._out))

    @contextmanager
    def _timing(self, stream: torch.cuda.Stream) -> Iterator[None]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        yield
        end.record(stream)
        self._timed[stream].append((start, end))

    def _take_time_s(self, stream: torch.cuda.Stream) -> float:
        timed = self._timed[stream]
        time_ms = sum(start.elapsed_time(end) for start, end in timed)
        timed.clear()
        return float(time_ms) / 1e3


def _as_tensor(slot: Bytes | torch.Tensor) -> torch.Tensor:
    """A slot of host memory, or one of the device that blocks pass through on their way to other engines."""
    return slot if isinstance(slot, torch.Tensor) else torch.from_numpy(slot)
