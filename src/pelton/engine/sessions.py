"""`Sessions`: which requests are turns of one conversation, and what becomes of its KV between them.

A session is named by the client, by an earlier answer of it, or recognised: a prompt that goes on after the
whole prompt of an earlier turn of the same tenant is its next turn, or a fork where that turn has been
continued already. Sessions form programs (agent runs); a fork belongs to the program it came from.

After a turn its full blocks are pinned for as long as it pays (`pauses.py`, `KVCosts.keep_limit_s`), if its
session has shown that it comes back: named by the client, or past its first turn. The next turn's admission
ends the pin of the one it continues. A turn's pause is the time from its end to the next one's arrival; it
is known by the tool whose result the next prompt ends with, where the client tells.

Ids are a tenant's own: nothing here is found by another tenant. All tables are bounded.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from pelton.core.batch import NULL_BLOCK_ID
from pelton.core.protocols import Clock
from pelton.core.request import Request, Submission
from pelton.core.session import SessionInfo
from pelton.engine.kv.costs import KVCosts
from pelton.engine.kv.manager import KVManager
from pelton.engine.kv.pins import Pin, PinEnd, PinTable
from pelton.engine.pauses import PauseTimes, QueueDelay, TurnCorrelation
from pelton.engine.session_index import Program, Session, Turn, TurnIndex

MAX_SESSIONS = 4096
MAX_IDLE_S = 1800.0
# A turn that nobody has continued for so long is taken for the last one.
GONE_AFTER_S = 120.0
MAX_TURNS_KEPT = 16  # of a session: the latest; forks from earlier ones are not recognised


@dataclass(slots=True, eq=False)
class _Arrival:
    """A turn under way."""

    session: Session
    continues: Turn | None
    arrival_s: float
    is_admitted: bool = False


class Sessions:
    def __init__(
        self, kv: KVManager, clock: Clock, costs: KVCosts, pins: PinTable, *, pauses: PauseTimes | None = None
    ) -> None:
        self.pins = pins
        self.pauses = pauses or PauseTimes()
        self.queue_delay = QueueDelay()
        self.turns_left = TurnCorrelation()
        self._kv = kv
        self._clock = clock
        self._costs = costs
        self._by_tenant: dict[str, OrderedDict[str, Session]] = {}  # least recently used first
        self._num_sessions = 0
        self._programs: dict[tuple[str, str], tuple[Program, set[Session]]] = {}
        self._index = TurnIndex(kv.block_size)
        self._under_way: dict[str, _Arrival] = {}
        self._open_turns: deque[Turn] = deque()  # in order of their end, until continued or given up
        self._inferred_ids = count(1)
        self._next_idle_check_s = 0.0

    def __len__(self) -> int:
        return self._num_sessions

    def tenant_ids(self) -> Iterable[str]:
        """Tenants that have sessions."""
        return self._by_tenant.keys()

    def num_of(self, tenant_id: str) -> int:
        return len(self._by_tenant.get(tenant_id, ()))

    # -- a turn's way -----------------------------------------------------------------------------

    def arrive(self, submission: Submission, requests: Sequence[Request]) -> None:
        """Find the session and program of a submission's sequences, before they are queued."""
        now_s = self._clock.now_s()
        first = requests[0]
        self._kv.prepare(first)
        session, turn = self._find(submission, first, now_s)
        session.used_s = now_s
        session.num_running += 1
        self._by_tenant[session.tenant_id].move_to_end(session.session_id)
        for request in requests:
            request.session_id = session.session_id
            request.program_id = session.program.program_id
            request.program_arrival_s = session.program.arrival_s
        self._under_way[first.request_id] = _Arrival(session, turn, now_s)
        if turn is None:
            return
        turn.is_continued = True
        tool_name = submission.tool_names[0] if submission.tool_names else None
        session.add_tool(tool_name)
        if session.comes_back:
            self.pauses.observe(session.tenant_id, tool_name, now_s - turn.ended_s)
        if turn.pin is not None:
            turn.pin.is_awaited = turn.pin.ended is None

    def admitted(self, request_id: str) -> None:
        """The request has its blocks: those of the turn before it need no pin any more."""
        arrival = self._under_way.get(request_id)
        if arrival is None or arrival.is_admitted:
            return
        arrival.is_admitted = True
        turn, now_s = arrival.continues, self._clock.now_s()
        if turn is None:
            return
        if turn.pin is not None and turn.pin.ended is None:
            self.pins.end(turn.pin, PinEnd.SUPERSEDED)
        else:
            self.queue_delay.observe(now_s - arrival.arrival_s)

    def end(self, request: Request, *, is_complete: bool, num_other_tokens: int) -> float:
        """The request has ended and still holds its blocks. Returns for how long they are kept, in seconds.

        `is_complete`: it came to its own end; a cancelled or failed turn leaves the one before it to be
        continued again. `num_other_tokens`: context of the other running requests.
        """
        arrival = self._under_way.pop(request.request_id, None)
        if arrival is None:
            return 0.0
        session, now_s = arrival.session, self._clock.now_s()
        session.num_running -= 1
        session.used_s = now_s
        if not is_complete:
            self._give_back(arrival)
            return 0.0
        if session.is_forgotten:
            return 0.0
        self._by_tenant[session.tenant_id].move_to_end(session.session_id)
        session.num_turns += 1
        turn = self._remember(session, request, now_s)
        return self._pin(turn, request, num_other_tokens) if session.comes_back else 0.0

    def _give_back(self, arrival: _Arrival) -> None:
        turn = arrival.continues
        if turn is None:
            return
        turn.is_continued = False
        if turn.pin is not None and turn.pin.ended is None:
            self.pins.stop_awaiting(turn.pin)

    def _pin(self, turn: Turn, request: Request, num_other_tokens: int) -> float:
        """Keep the turn's published blocks for as long as it pays, within the tenant's quota."""
        session, num_tokens = turn.session, request.num_computed_tokens
        gain_s = self.queue_delay.mean_s * self.turns_left.eta + self._costs.return_s(num_tokens)
        limit_s = self._costs.keep_limit_s(num_tokens, num_other_tokens)
        keep_s = self.pauses.keep_s(session.tenant_id, session.tool_name, gain_s, limit_s)
        if keep_s <= 0.0:
            return 0.0
        blocks = self._kv.pool.blocks
        pin = Pin(
            tenant_id=session.tenant_id,
            program_arrival_s=session.program.arrival_s,
            block_ids=tuple(
                block_id
                for table in request.block_tables
                for block_id in table
                if block_id != NULL_BLOCK_ID and blocks[block_id].key is not None
            ),
            expires_s=turn.ended_s + keep_s,
        )
        if not self.pins.try_pin(pin):
            return 0.0
        turn.pin = pin
        return keep_s

    # -- time passes ------------------------------------------------------------------------------

    def expire(self) -> None:
        """End what has had its time: pins, turns that nobody came back to, idle sessions."""
        now_s = self._clock.now_s()
        self.pins.expire()
        while self._open_turns and self._open_turns[0].ended_s < now_s - GONE_AFTER_S:
            turn = self._open_turns.popleft()
            if not turn.is_continued and turn.session.comes_back:
                self.pauses.observe(turn.session.tenant_id, turn.session.tool_name, math.inf)
        if now_s >= self._next_idle_check_s:
            self._next_idle_check_s = now_s + 1.0
            self.pins.charge()
            self._forget_idle(now_s)

    @property
    def next_expiry_s(self) -> float | None:
        return self.pins.next_expiry_s

    # -- what tenants may see and do --------------------------------------------------------------

    def infos(self, tenant_id: str) -> list[SessionInfo]:
        """A tenant's sessions, the latest used first."""
        now_s = self._clock.now_s()
        sessions = self._by_tenant.get(tenant_id)
        return [self._info(session, now_s) for session in reversed(sessions.values())] if sessions else []

    def delete(self, tenant_id: str, session_id: str) -> bool:
        """Forget a session and end its pins; requests under way go on. False: the tenant has none of that id."""
        session = self._named(tenant_id, session_id)
        if session is None:
            return False
        self._forget(session)
        return True

    def _info(self, session: Session, now_s: float) -> SessionInfo:
        pins = [turn.pin for turn in session.turns if turn.pin is not None and turn.pin.ended is None]
        return SessionInfo(
            session_id=session.session_id,
            program_id=session.program.program_id,
            is_inferred=session.is_inferred,
            age_s=now_s - session.created_s,
            idle_s=now_s - session.used_s,
            num_turns=session.num_turns,
            num_running=session.num_running,
            num_context_tokens=max((turn.num_tokens for turn in session.turns), default=0),
            num_pinned_blocks=len({block_id for pin in pins for block_id in pin.block_ids}),
            pin_expires_in_s=max((max(0.0, pin.expires_s - now_s) for pin in pins), default=None),
        )

    # -- who is it --------------------------------------------------------------------------------

    def _find(self, submission: Submission, request: Request, now_s: float) -> tuple[Session, Turn | None]:
        """The session of a new request, and the turn that it continues."""
        tenant_id = submission.tenant_id
        session: Session | None = None
        if submission.session_id is not None:
            session = self._named(tenant_id, submission.session_id)
        elif submission.previous_request_id is not None:
            previous = self._index.of_request(tenant_id, submission.previous_request_id)
            session = previous.session if previous is not None else None
        turn = self._index.match(request, session)
        if session is None:
            if turn is not None and submission.session_id is None and not turn.is_continued:
                session = turn.session
            else:
                session = self._add(submission, turn.session.program if turn is not None else None, now_s)
                turn = None
        if submission.program_id is not None and submission.program_id != session.program.program_id:
            self._join(session, submission.program_id, now_s)
        return session, None if turn is None or turn.is_continued else turn

    def _named(self, tenant_id: str, session_id: str) -> Session | None:
        sessions = self._by_tenant.get(tenant_id)
        return sessions.get(session_id) if sessions is not None else None

    def _add(self, submission: Submission, program: Program | None, now_s: float) -> Session:
        """A new session; `program` is that of the turn it forks from."""
        while self._num_sessions >= MAX_SESSIONS and self._forget_one():
            pass
        is_inferred = submission.session_id is None
        sessions = self._by_tenant.setdefault(submission.tenant_id, OrderedDict())
        session_id = submission.session_id
        while session_id is None or (is_inferred and session_id in sessions):
            session_id = f"auto-{next(self._inferred_ids)}"
        program_id = submission.program_id or (program.program_id if program is not None else session_id)
        session = Session(
            submission.tenant_id, session_id, Program(program_id, now_s), is_inferred, created_s=now_s, used_s=now_s
        )
        sessions[session_id] = session
        self._num_sessions += 1
        self._join(session, program_id, now_s)
        return session

    def _join(self, session: Session, program_id: str, now_s: float) -> None:
        self._leave(session)
        key = (session.tenant_id, program_id)
        program, members = self._programs.setdefault(key, (Program(program_id, now_s), set()))
        members.add(session)
        session.program = program

    def _leave(self, session: Session) -> None:
        key = (session.tenant_id, session.program.program_id)
        _, members = self._programs.get(key, (None, set[Session]()))
        members.discard(session)
        if not members:
            self._programs.pop(key, None)

    # -- remembering and forgetting ---------------------------------------------------------------

    def _remember(self, session: Session, request: Request, now_s: float) -> Turn:
        turn = Turn.of(session, request, self._kv.block_size, now_s)
        session.turns.append(turn)
        self._open_turns.append(turn)
        self._index.add(turn)
        if len(session.turns) > MAX_TURNS_KEPT:
            self._forget_turn(session.turns.popleft())
        return turn

    def _forget_turn(self, turn: Turn) -> None:
        self._index.remove(turn)
        if turn.pin is not None:
            self.pins.end(turn.pin, PinEnd.DELETED)

    def _forget(self, session: Session) -> None:
        session.is_forgotten = True
        for turn in session.turns:
            self._forget_turn(turn)
        self._leave(session)
        sessions = self._by_tenant[session.tenant_id]
        del sessions[session.session_id]
        if not sessions:
            del self._by_tenant[session.tenant_id]
        self._num_sessions -= 1

    def _forget_idle(self, now_s: float) -> None:
        idle = []
        for sessions in self._by_tenant.values():
            for session in sessions.values():
                if session.used_s >= now_s - MAX_IDLE_S:
                    break
                if not session.num_running:
                    idle.append(session)
        for session in idle:
            if session.comes_back:
                self.turns_left.observe(session.num_turns)
            self._forget(session)

    def _forget_one(self) -> bool:
        """Too many sessions: the tenant with most of them loses the one used least recently.

        False: all of its are under way; the queue bounds those.
        """
        sessions = max(self._by_tenant.values(), key=len)
        idle = next((session for session in sessions.values() if not session.num_running), None)
        if idle is None:
            return False
        self._forget(idle)
        return True
