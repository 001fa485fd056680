"""`UsageMeter`: tokens by tenant and key, taken from the engine's updates and journaled before they are delivered.

What counts is what the engine's own counters count: a prompt once, when its request is admitted, and every output
token that an update brings; cancelled and failed requests included. Tokens that the engine had computed but not
told when either process was killed are nobody's: no client has them, and no counter that is left does.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from pelton.core.events import EngineStats, EventKind
from pelton.core.output import RequestOutput
from pelton.engine.client import RequestStream
from pelton.engine.wire import EngineUpdate
from pelton.serving.logs import Logger
from pelton.serving.tenants.journal import Journal
from pelton.serving.tenants.quotas import Quotas, Reservation
from pelton.store.records import Tokens

HOUR_S = 3600
_log = Logger()


@dataclass(slots=True, eq=False)
class Ticket:
    """One HTTP request under way, with all its submissions."""

    tenant_id: str
    key_id: str
    reservation: Reservation | None = None
    used: Tokens = field(default_factory=Tokens)
    num_open: int = 0  # submissions that have not ended
    streams: list[RequestStream] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Live:
    """One submission."""

    ticket: Ticket
    num_prompt_tokens: int
    num_open: int  # sequences that have not ended
    num_restarts: int  # of the engine, when it was sent
    is_admitted: bool = False


class UsageMeter:
    """A listener of `EngineClient`. Used on the event loop."""

    def __init__(self, folder: Path, quotas: Quotas, stats: EngineStats) -> None:
        self.folder = folder
        self._quotas = quotas
        self._journal = Journal(folder)
        self._live: dict[str, _Live] = {}
        self._unwritten: defaultdict[tuple[str, str], Tokens] = defaultdict(Tokens)
        self.unfolded: defaultdict[str, int] = defaultdict(int)  # tokens by tenant in the journal of now
        self._run_id = uuid4().hex
        self._first = self._last = stats  # the engine's counters when this began, and as it told them last

    # -- requests -----------------------------------------------------------------------------------

    def begin(self, ticket: Ticket, submission_id: str, num_prompt_tokens: int, n: int, num_restarts: int) -> None:
        """To be called before the submission is sent."""
        ticket.num_open += 1
        self._live[submission_id] = _Live(ticket, num_prompt_tokens, n, num_restarts)

    def drop(self, submission_id: str) -> None:
        """It was not sent after all."""
        live = self._live.pop(submission_id, None)
        if live is not None:
            self._end(live)

    def drop_lost(self, num_restarts: int, *, is_engine_up: bool) -> None:
        """Submissions that ended with their engine: no update will tell."""
        for submission_id, live in list(self._live.items()):
            if not is_engine_up or live.num_restarts != num_restarts:
                self.drop(submission_id)

    def tickets(self) -> Iterator[Ticket]:
        return iter({id(live.ticket): live.ticket for live in self._live.values()}.values())

    # -- what the engine tells ----------------------------------------------------------------------

    def take_update(self, update: EngineUpdate) -> None:
        stats = update.stats
        if stats.num_steps_total < self._last.num_steps_total:  # another engine, which counts from zero
            self._run_id, self._first = uuid4().hex, EngineStats()
        self._last = stats
        if self._live:
            for event in update.events:
                if event.kind is EventKind.SCHEDULED:
                    live = self._live.get(event.request_id.partition("#")[0])
                    if live is not None and not live.is_admitted:
                        self._admit(live, event.num_tokens)
            ended = [live for output in update.outputs if (live := self._take_output(output)) is not None]
            self._write()
            for live in ended:
                self._end(live)

    def _admit(self, live: _Live, num_cached_tokens: int) -> None:
        live.is_admitted = True
        ticket = live.ticket
        is_first = ticket.used.num_requests == 0
        self._count(ticket, Tokens(int(is_first), live.num_prompt_tokens, num_cached_tokens))

    def _take_output(self, output: RequestOutput) -> _Live | None:
        """The submission, where this was its last."""
        live = self._live.get(output.request_id)
        if live is None:
            return None
        if output.token_ids:
            self._count(live.ticket, Tokens(num_output_tokens=len(output.token_ids)))
        if output.finish_reason is not None:
            live.num_open -= 1
            if not live.num_open:
                return self._live.pop(output.request_id)
        return None

    def _count(self, ticket: Ticket, tokens: Tokens) -> None:
        ticket.used.add(tokens)
        self._unwritten[ticket.tenant_id, ticket.key_id].add(tokens)
        self._quotas.spent[ticket.tenant_id] += tokens.num_total
        self.unfolded[ticket.tenant_id] += tokens.num_total

    def _write(self) -> None:
        if not self._unwritten:
            return
        rows = [
            (*account, used.num_requests, used.num_prompt_tokens, used.num_cached_tokens, used.num_output_tokens)
            for account, used in self._unwritten.items()
        ]
        totals = (
            self._last.num_prompt_tokens_total - self._first.num_prompt_tokens_total,
            self._last.num_output_tokens_total - self._first.num_output_tokens_total,
        )
        try:
            self._journal.append(int(time.time()) // HOUR_S * HOUR_S, self._run_id, totals, rows)
        except OSError as error:  # kept, and written with the next update
            _log.warning("usage is not journaled", problem=str(error.strerror or error))
            return
        self._unwritten.clear()

    def _end(self, live: _Live) -> None:
        ticket = live.ticket
        ticket.num_open -= 1
        if ticket.num_open == 0 and ticket.reservation is not None:
            reservation, ticket.reservation = ticket.reservation, None
            used = ticket.used
            self._quotas.settle(reservation, used.num_total, was_admitted=used.num_requests > 0)

    # -- the journal --------------------------------------------------------------------------------

    @property
    def has_news(self) -> bool:
        return not self._journal.is_empty

    def rotate(self) -> Callable[[], None]:
        """Go on with a new journal, and leave the one so far to be folded. Returns what closes that, off the loop."""
        old, self._journal = self._journal, Journal(self.folder)
        self.unfolded.clear()

        def close() -> None:
            old.sync()
            old.close()

        return close

    def close(self) -> None:
        self._write()
        self._journal.sync()
        self._journal.close()
