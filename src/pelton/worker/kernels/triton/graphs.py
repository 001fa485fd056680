"""Steps that are captured as CUDA graphs when their shape first comes, and replayed from then on."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

import torch

from pelton.worker.kernels.triton.device import is_out_of_memory

Run = Callable[[], torch.Tensor]


class Graphs(Protocol):
    def run(self, key: Hashable, run: Run) -> torch.Tensor:
        """What `run` computes now. Calls of one key must differ in nothing but the values at fixed addresses; the
        result may lie where the next call's does."""
        ...

    def clear(self) -> None:
        """Addresses have changed."""
        ...


class NoGraphs:
    """Implements `Graphs` where nothing can be captured."""

    def run(self, key: Hashable, run: Run) -> torch.Tensor:
        del key
        return run()

    def clear(self) -> None:
        pass


class CudaGraphs:
    """Implements `Graphs`. All share one pool of memory, since one runs at a time."""

    def __init__(self) -> None:
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def run(self, key: Hashable, run: Run) -> torch.Tensor:
        found = self._captured.get(key)
        if found is None:
            return self._capture(key, run)
        graph, result = found
        graph.replay()
        return result

    def clear(self) -> None:
        if self._captured:
            torch.cuda.synchronize()
            self._captured.clear()

    def _capture(self, key: Hashable, run: Run) -> torch.Tensor:
        """Run once as it is, which compiles kernels and is this step's own computation, then record."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            computed = run()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may copy blocks or load adapters meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = run()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            computed.record_stream(current)
            return computed  # a graph keeps its memory, and there is none left for one
        del computed
        self._captured[key] = (graph, result)
        graph.replay()
        return result


def make_graphs(device: torch.device) -> Graphs:
    return CudaGraphs() if device.type == "cuda" else NoGraphs()
