"""Virtual time: an asyncio event loop whose clock jumps to the next timer instead of waiting for it.

Everything that is written for asyncio, such as the workload drivers of `bench/`, runs on it unchanged; only
computing takes real time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from pelton.core.errors import PeltonError

Result = TypeVar("Result")


class SimulationError(PeltonError):
    """The simulated world cannot go on."""

    code = "simulation_failed"


class VirtualClock:
    """Implements `Clock`; starts at 0 s and moves only forward."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now_s(self) -> float:
        return self._now_s

    def advance(self, duration_s: float) -> None:
        self._now_s += duration_s


class _TimeSelector(selectors.BaseSelector):
    """Waiting for nothing but time: a wait is over at once, and the clock says that it was as long as asked."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._real = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise SimulationError("nothing more will happen, but something still waits")
        if timeout > 0:
            self._clock.advance(timeout)
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(_TimeSelector(clock))
        self.clock = clock

    def time(self) -> float:
        return self.clock.now_s()


def run_virtual(main: Coroutine[Any, Any, Result], clock: VirtualClock) -> Result:
    """As `asyncio.run`, on virtual time. Raises `SimulationError` where all wait for ever."""
    with asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(clock)) as runner:
        return runner.run(main)
