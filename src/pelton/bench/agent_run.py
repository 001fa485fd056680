"""Runs agent plans against something that answers: a server over HTTP, or an engine on virtual time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pelton.bench.agents import AgentPlan, Piece, Turn
from pelton.bench.record import RequestRecord

# Called after each turn with the turns that have ended.
OnTurn = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentCall:
    """One turn's request. `number` counts the session's turns from 0."""

    pieces: tuple[Piece, ...]
    num_output_tokens: int
    tenant_id: str
    session_id: str
    program_id: str
    number: int


class AgentTarget(Protocol):
    async def answer(self, call: AgentCall) -> RequestRecord:
        """The record of one request; a failure is a record with `error`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRecord:
    """`num_seen_tokens`: how much of the prompt the server had been given before (by this transcript, or, of the
    system prompt, by any), as far as is known from its own counts.
    """

    call: AgentCall
    record: RequestRecord
    started_s: float
    num_seen_tokens: int

    @property
    def num_recomputed_tokens(self) -> int | None:
        """Seen before and computed again; None where the server does not say what it found cached."""
        if self.record.num_cached_tokens is None:
            return None
        return max(0, self.num_seen_tokens - self.record.num_cached_tokens)


@dataclass(slots=True, kw_only=True)
class AgentRecord:
    """One agent with its forks. Times in seconds since the run began; `turns` in order of their end."""

    plan: AgentPlan
    started_s: float
    ended_s: float
    pause_s: float  # waited for tools on its own way; forks count as waiting for the server
    turns: list[TurnRecord]

    @property
    def error(self) -> str | None:
        return next((turn.record.error for turn in self.turns if turn.record.error is not None), None)

    @property
    def completion_s(self) -> float:
        return self.ended_s - self.started_s


@dataclass(slots=True)
class _Transcript:
    """`num_seen_tokens`: of `pieces`, by the server's count, sent already."""

    pieces: tuple[Piece, ...]
    num_seen_tokens: int


class AgentRunner:
    """Time is that of the running event loop."""

    def __init__(self, target: AgentTarget, on_turn: OnTurn = lambda _: None) -> None:
        self._target = target
        self._on_turn = on_turn
        self._num_turns = 0
        self._known_systems: set[str] = set()
        self._start_s = 0.0

    async def run(self, plans: list[AgentPlan], num_concurrent: int) -> list[AgentRecord]:
        """All agents, `num_concurrent` at a time, in order of their end."""
        waiting = deque(plans)
        records: list[AgentRecord] = []
        self._start_s = asyncio.get_running_loop().time()

        async def work() -> None:
            while waiting:
                records.append(await self._run_agent(waiting.popleft()))

        await asyncio.gather(*(work() for _ in range(num_concurrent)))
        return records

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time() - self._start_s

    async def _run_agent(self, plan: AgentPlan) -> AgentRecord:
        assert plan.system is not None
        await asyncio.sleep(plan.start_s)
        seen = plan.system.num_tokens if plan.system.piece_id in self._known_systems else 0
        record = AgentRecord(plan=plan, started_s=self._now_s(), ended_s=0.0, pause_s=0.0, turns=[])
        record.pause_s = await self._run_turns(plan, _Transcript((plan.system,), seen), record.turns)
        self._known_systems.add(plan.system.piece_id)
        record.ended_s = self._now_s()
        return record

    async def _run_turns(self, plan: AgentPlan, transcript: _Transcript, records: list[TurnRecord]) -> float:
        """Seconds waited for tools. An agent gives up at its first error."""
        pause_s = 0.0
        for number, turn in enumerate(plan.turns):
            record = await self._answer(plan, turn, number, transcript)
            records.append(record)
            self._num_turns += 1
            self._on_turn(self._num_turns)
            if record.record.error is not None or turn is plan.turns[-1]:
                break
            if turn.forks:
                await self._run_forks(turn, transcript, records)
            else:
                await asyncio.sleep(turn.pause_s)
                pause_s += turn.pause_s
        return pause_s

    async def _run_forks(self, turn: Turn, transcript: _Transcript, records: list[TurnRecord]) -> None:
        forks = [(fork, _Transcript(transcript.pieces, transcript.num_seen_tokens)) for fork in turn.forks]
        await asyncio.gather(*(self._run_turns(fork, own, records) for fork, own in forks))

    async def _answer(self, plan: AgentPlan, turn: Turn, number: int, transcript: _Transcript) -> TurnRecord:
        transcript.pieces += (turn.new,)
        call = AgentCall(
            pieces=transcript.pieces,
            num_output_tokens=turn.num_output_tokens,
            tenant_id=plan.tenant_id,
            session_id=plan.agent_id,
            program_id=plan.program_id,
            number=number,
        )
        started_s = self._now_s()
        record = await self._target.answer(call)
        result = TurnRecord(call=call, record=record, started_s=started_s, num_seen_tokens=transcript.num_seen_tokens)
        transcript.num_seen_tokens = record.num_prompt_tokens
        transcript.pieces += (turn.answer,)
        return result
