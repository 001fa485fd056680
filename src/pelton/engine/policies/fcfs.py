"""First come, first served: order of arrival; the latest arrival yields (Orca, vLLM's default)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pelton.core.request import Request, RequestStatus
from pelton.engine.policies.context import PolicyContext
from pelton.engine.policies.ordered_waiting import Key, OrderedWaiting


class FCFSPolicy:
    """A preempted request keeps its arrival time and so returns to the front."""

    def __init__(self, context: PolicyContext | None = None) -> None:
        self._context = context or PolicyContext()
        self._waiting = OrderedWaiting(self.rank)

    def rank(self, request: Request) -> Key:
        """Lower runs first."""
        return (request.arrival_time_s,)

    def add(self, request: Request) -> None:
        self._waiting.add(request)

    def admit(self, request: Request, num_cached_tokens: int) -> None:  # noqa: ARG002
        self._waiting.remove(request)

    def preempt(self, request: Request) -> None:
        self._waiting.add(request)

    def finish(self, request: Request) -> None:
        if request.status is not RequestStatus.RUNNING:
            self._waiting.remove(request)

    def waiting(self) -> Iterable[Request]:
        return self._waiting

    def __len__(self) -> int:
        return len(self._waiting)

    def choose_victim(self, running: Sequence[Request], beneficiary: Request) -> Request | None:
        unharmed = (other for other in reversed(running) if other.has_progressed or other is beneficiary)
        victim = max(unharmed, key=self.rank, default=None)
        if victim is None or self.rank(victim) < self.rank(beneficiary):
            return None
        return victim

    def charge(self, request: Request, num_output_tokens: int) -> None:
        """Order of arrival charges nothing."""

    def charge_kv(self, tenant_id: str, num_block_seconds: float) -> None:
        """Order of arrival charges nothing."""
