"""`SimulatedServer`: the production engine on virtual time, turned as `EngineLoop` turns it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from pelton.bench.record import RequestRecord
from pelton.core.batch import StepResult
from pelton.core.events import EngineStats, EventKind
from pelton.core.output import RequestOutput
from pelton.core.request import FinishReason, Submission
from pelton.engine.engine import Engine
from pelton.simulate.executor import CostExecutor


@dataclass(slots=True)
class _Call:
    done: asyncio.Future[RequestRecord]
    started_s: float
    keep_times: bool
    times_s: list[float] = field(default_factory=list)
    last_s: float = 0.0


class SimulatedServer:
    """Requests of one sequence each. Call from the virtual loop only."""

    def __init__(self, engine: Engine, executor: CostExecutor) -> None:
        self.engine = engine
        self.executor = executor
        self.num_preempted_tokens = 0  # given up by preemptions
        self._loop = asyncio.get_running_loop()
        self._calls: dict[str, _Call] = {}
        self._is_woken = False
        self._alarm: asyncio.TimerHandle | None = None

    def submit(self, submission: Submission, *, keep_times: bool = True) -> asyncio.Future[RequestRecord]:
        """The record of a request, once it has ended; one that is refused has `error`.

        `keep_times` keeps when each token came, and not just the first and the last.
        """
        call = _Call(self._loop.create_future(), self._loop.time(), keep_times)
        self._calls[submission.request_id] = call
        self.engine.submit(submission)
        self._wake()
        return call.done

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats()

    def _wake(self, _: Future[StepResult] | None = None) -> None:
        """Turn once all that happens at this moment has happened."""
        if not self._is_woken:
            self._is_woken = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._is_woken = False
        engine = self.engine
        engine.expire()
        while engine.is_step_done:
            engine.collect()
        engine.dispatch(self._wake)
        outputs, events = engine.take_outputs()
        self._take_outputs(outputs)
        for event in events:
            if event.kind is EventKind.PREEMPTED:
                self.num_preempted_tokens += event.num_tokens
        self._set_alarm()

    def _set_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if (deadline_s := self.engine.next_deadline_s) is not None:
            self._alarm = self._loop.call_at(deadline_s, self._wake)

    def _take_outputs(self, outputs: Iterable[RequestOutput]) -> None:
        now_s = self._loop.time()
        calls = self._calls
        for output in outputs:
            call = calls[output.request_id]
            if output.token_ids:
                if call.keep_times or not call.times_s:
                    call.times_s.append(now_s - call.started_s)
                call.last_s = now_s
            if output.finish_reason is not None:
                self._end(calls.pop(output.request_id), output, now_s)

    def _end(self, call: _Call, output: RequestOutput, now_s: float) -> None:
        usage = output.usage
        if not call.keep_times and usage is not None and usage.num_output_tokens > 1:
            call.times_s.append(call.last_s - call.started_s)
        failed = output.finish_reason in (FinishReason.ERROR, FinishReason.CANCELLED)
        problem = output.error.message if output.error is not None else str(output.finish_reason)
        record = RequestRecord(
            elapsed_s=now_s - call.started_s,
            chunk_times_s=tuple(call.times_s),
            num_prompt_tokens=usage.num_prompt_tokens if usage else 0,
            num_output_tokens=usage.num_output_tokens if usage else 0,
            num_cached_tokens=usage.num_cached_tokens if usage else None,
            error=problem if failed else None,
        )
        if not call.done.done():
            call.done.set_result(record)
