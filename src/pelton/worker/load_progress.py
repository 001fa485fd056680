"""How far a load has come, for whoever waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable

from pelton.weights.tensors import WeightTensor

INTERVAL_S = 1.0


class LoadProgress:
    """Calls `report` with the share that is loaded, from 0 to 1, every second at most; never for a shorter load."""

    def __init__(
        self,
        num_bytes: int,
        size_of: Callable[[WeightTensor], int],
        report: Callable[[float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_bytes = num_bytes
        self._size_of = size_of
        self._report = report
        self._clock = clock
        self._num_loaded = 0
        self._reported_s = clock()

    def pass_on(self, tensor: WeightTensor) -> WeightTensor:
        """The same tensor, which is asked for once those before it are loaded."""
        now_s = self._clock()
        if now_s - self._reported_s >= INTERVAL_S:
            self._reported_s = now_s
            self._report(min(1.0, self._num_loaded / self._num_bytes))  # some are asked for twice
        self._num_loaded += self._size_of(tensor)
        return tensor
