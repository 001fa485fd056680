"""`CudaCopies`: KV blocks between the device and pinned host memory, beside the steps."""

from __future__ import annotations

import torch

from pelton.worker.kernels.block_copies import Block, Bytes


class CudaCopies:
    """Implements `BlockCopies`. Bytes travel on two streams of their own, from and to packed blocks on the device;
    the steps' stream packs and unpacks, and waits for nothing but what is loaded."""

    def __init__(self) -> None:
        self._in = torch.cuda.Stream()
        self._out = torch.cuda.Stream()

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
            packed.copy_(torch.from_numpy(source).view(destination.dtype).view(destination.shape), non_blocking=True)
        steps.wait_stream(self._in)
        packed.record_stream(steps)
        destination.copy_(packed)

    def store(self, destination: Bytes, source: Block) -> None:
        packed = source.clone(memory_format=torch.contiguous_format)
        self._out.wait_stream(torch.cuda.current_stream())
        packed.record_stream(self._out)
        with torch.cuda.stream(self._out):
            host = torch.from_numpy(destination).view(source.dtype).view(source.shape)
            host.copy_(packed, non_blocking=True)

    def wait(self) -> None:
        self._in.synchronize()
        self._out.synchronize()
