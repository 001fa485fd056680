"""`KVWait`: a new request waits, within bounds, for KV that is on its way to the cache: from disk, then from a peer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pelton.core.protocols import Clock
from pelton.core.request import Request
from pelton.engine.kv.manager import KVManager
from pelton.engine.kv.read_ahead import ReadAhead


class _Stage(Protocol):
    def __len__(self) -> int: ...

    def try_hold(self, request: Request) -> bool: ...

    def take_ready(self) -> list[Request]: ...

    def drop(self, request: Request) -> None: ...

    @property
    def next_deadline_s(self) -> float | None: ...


class KVWait:
    """Outside of `schedule()` (law 8): what has not come in time is computed, as if it had never been anywhere."""

    def __init__(self, kv: KVManager, clock: Clock) -> None:
        self._stages: Sequence[_Stage] = [ReadAhead(kv, clock)]
        if kv.transfer is not None:
            from pelton.engine.kv.peer_wait import PeerWait

            self._stages = [*self._stages, PeerWait(kv, kv.transfer, clock)]

    def __len__(self) -> int:
        return sum(map(len, self._stages))

    def try_hold(self, request: Request) -> bool:
        """Start to bring what `request` can use; False: nothing, or nothing that pays."""
        return self._try_hold(request, 0)

    def _try_hold(self, request: Request, first: int) -> bool:
        return any(stage.try_hold(request) for stage in self._stages[first:])

    def take_ready(self) -> list[Request]:
        """Requests that need not wait any more."""
        ready = []
        for number, stage in enumerate(self._stages, 1):
            ready += [request for request in stage.take_ready() if not self._try_hold(request, number)]
        return ready

    def drop(self, request: Request) -> None:
        """The request has ended."""
        for stage in self._stages:
            stage.drop(request)

    @property
    def next_deadline_s(self) -> float | None:
        times_s = [stage.next_deadline_s for stage in self._stages]
        return min((time_s for time_s in times_s if time_s is not None), default=None)
