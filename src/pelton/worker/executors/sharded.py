"""`ShardedExecutor`: every step on all ranks of a model. Rank 0 is in this process, each other one has its own.

A rank's process reads steps from its standard input and answers each with what it came to (`OUTCOME`). A step has its
result when all ranks say the same; where they do not, or where one has ended, nothing that they computed can be
trusted: all steps fail, and so does every later one, which ends the engine.
"""

from __future__ import annotations

import tempfile
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

import msgspec

from pelton.core.batch import ScheduledBatch, StepResult
from pelton.core.errors import EngineStepError
from pelton.worker.executors.in_process import InProcessExecutor
from pelton.worker.executors.other_rank import CLOSE_S, LENGTH, OUTCOME, OtherRank, Outcome

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ScheduledBatch)


def outcome_of(future: Future[StepResult]) -> Outcome:
    """What ranks compare of a step."""
    if future.exception() is not None:
        return 0, 0
    result = future.result()
    return 1, zlib.crc32(repr((result.sampled_token_ids, sorted(result.failed or ()))).encode())


@dataclass(slots=True)
class _Step:
    future: Future[StepResult]
    own: Future[StepResult] | None = None  # of rank 0, once it is done
    outcomes: list[Outcome] = field(default_factory=list)  # of the others


class ShardedExecutor:
    """Implements `core.protocols.Executor`."""

    block_store = None
    adapters = None
    connector = None

    def __init__(self, own: InProcessExecutor, others: Sequence[OtherRank]) -> None:
        self.matchers = own.matchers
        self._own = own
        self._others = others
        self._steps: dict[int, _Step] = {}
        self._lock = threading.Lock()
        self._problem: str | None = None
        self._is_closing = False
        self._listeners = [threading.Thread(target=self._listen, args=(other,), daemon=True) for other in others]
        for listener in self._listeners:
            listener.start()

    def submit(self, batch: ScheduledBatch) -> Future[StepResult]:
        """Raises `EngineStepError` once closed, and once a rank is lost."""
        step = _Step(Future())
        step.future.set_running_or_notify_cancel()
        data = _encoder.encode(batch)
        with self._lock:
            if self._problem is not None:
                raise EngineStepError(self._problem)
            self._steps[batch.step_id] = step
        try:
            for other in self._others:
                other.send(data)
        except OSError:
            self._lose(f"a rank ended before step {batch.step_id}")
            raise EngineStepError(f"a rank ended before step {batch.step_id}") from None
        self._own.submit(batch).add_done_callback(lambda own: self._settle(batch.step_id, own=own))
        return step.future

    def close(self) -> None:
        with self._lock:
            self._is_closing = True
        # A step that waits for a lost rank may never end; its thread does not keep the process.
        closer = threading.Thread(target=self._own.close, daemon=True)
        closer.start()
        closer.join(None if self._problem is None else CLOSE_S)
        for other in self._others:
            other.close()
        for listener in self._listeners:
            listener.join()

    def _listen(self, other: OtherRank) -> None:
        while (answer := other.receive()) is not None:
            self._settle(answer[0], outcome=answer[1])
        self._lose(f"the process of rank {other.rank} has ended")

    def _settle(self, step_id: int, *, own: Future[StepResult] | None = None, outcome: Outcome | None = None) -> None:
        with self._lock:
            step = self._steps.get(step_id)
            if step is None:
                return
            if own is not None:
                step.own = own
            if outcome is not None:
                step.outcomes.append(outcome)
            if step.own is None or len(step.outcomes) < len(self._others):
                return
            done = step.own
            is_same = set(step.outcomes) == {outcome_of(done)}
            if is_same:
                del self._steps[step_id]
        if not is_same:
            self._lose(f"ranks do not agree on what step {step_id} came to")
        elif (error := done.exception()) is not None:
            step.future.set_exception(error)
        else:
            step.future.set_result(done.result())

    def _lose(self, problem: str) -> None:
        with self._lock:
            if self._is_closing and not self._steps:
                return
            self._problem = self._problem or problem
            steps, self._steps = self._steps, {}
        for other in self._others:
            other.kill()
        for step in steps.values():
            step.future.set_exception(EngineStepError(problem))


def new_store() -> str:
    """A name that no file has: ranks meet there."""
    return str(Path(tempfile.mkdtemp(prefix="pelton-ranks-")) / "store")


def serve_rank(executor: InProcessExecutor, commands: IO[bytes], answer: Callable[[bytes], object]) -> None:
    """Steps as they come, until `commands` ends."""

    def tell(step_id: int, future: Future[StepResult]) -> None:
        answer(OUTCOME.pack(step_id, *outcome_of(future)))

    while header := commands.read(LENGTH.size):
        batch = _decoder.decode(commands.read(*LENGTH.unpack(header)))
        executor.submit(batch).add_done_callback(partial(tell, batch.step_id))
