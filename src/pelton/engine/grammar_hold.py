"""`GrammarHold`: a new request whose grammar is still compiled waits for it before it is scheduled (law 8)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from pelton.core.grammar import Grammar
from pelton.core.request import Request

# Starts to compile a grammar, or finds it compiled; the future fails with what is wrong with it.
Prepare = Callable[[Grammar], Future[None]]


class GrammarHold:
    """Nobody else's step waits for a grammar, nor for the part of the vocabulary that the first one needs."""

    def __init__(self) -> None:
        self.prepare: Prepare | None = None
        self.wake: Callable[[], None] = _do_nothing  # called, on another thread, when a grammar is there
        self._held: dict[str, tuple[Request, Future[None]]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def try_hold(self, request: Request) -> bool:
        """False where nothing has to be waited for."""
        grammar = request.sampling.grammar
        if grammar is None or self.prepare is None:
            return False
        ready = self.prepare(grammar)
        if ready.done() and ready.exception() is None:
            return False
        self._held[request.request_id] = (request, ready)
        ready.add_done_callback(lambda _: self.wake())
        return True

    def take_ready(self) -> list[tuple[Request, BaseException | None]]:
        """Requests that need not wait any more, in order of arrival, and why they cannot run."""
        found = [(request, ready) for request, ready in self._held.values() if ready.done()]
        for request, _ in found:
            del self._held[request.request_id]
        return [(request, ready.exception()) for request, ready in found]

    def drop(self, request: Request) -> None:
        self._held.pop(request.request_id, None)


def _do_nothing() -> None:
    pass
