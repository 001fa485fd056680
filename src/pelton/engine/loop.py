"""`EngineLoop`: one thread that turns the engine, fed by an inbox, heard through `emit`."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from pelton.core.batch import StepResult
from pelton.engine.engine import Engine
from pelton.engine.wire import (
    Cancel,
    Command,
    DeleteSession,
    DescribeTenants,
    EngineUpdate,
    ListSessions,
    LoadAdapter,
    SetTenant,
    Shutdown,
    Submit,
    UnloadAdapter,
)


@dataclass(frozen=True, slots=True)
class _StepDone:
    pass


class EngineLoop:
    """Commands and finished steps arrive in one queue, so that waiting for either is waiting for one."""

    def __init__(self, engine: Engine, emit: Callable[[EngineUpdate], None]) -> None:
        self.engine = engine
        self._emit = emit
        self._inbox: queue.SimpleQueue[Command | _StepDone] = queue.SimpleQueue()
        engine.wake_with(lambda: self._inbox.put(_StepDone()))

    def put(self, command: Command) -> None:
        """Callable from any thread."""
        self._inbox.put(command)

    def run(self) -> None:
        """Until `Shutdown`."""
        engine = self.engine
        try:
            while self._take_commands():
                engine.expire()
                if engine.is_step_done:
                    engine.collect()
                engine.dispatch(self._step_done)
                # After dispatch: the executor works while outputs travel.
                if (update := engine.take_update()) is not None:
                    self._emit(update)
        finally:
            engine.executor.close()

    def _step_done(self, _: Future[StepResult]) -> None:
        self._inbox.put(_StepDone())

    def _take_commands(self) -> bool:
        """Wait for something to do and do all of it; False: shut down."""
        command = self._wait()
        while command is not None:
            match command:
                case Submit(submission=submission):
                    self.engine.submit(submission)
                case Cancel(request_id=request_id):
                    self.engine.cancel(request_id)
                case ListSessions() | DeleteSession() | DescribeTenants() | LoadAdapter() | UnloadAdapter():
                    self.engine.ask(command)
                case SetTenant(tenant_id=tenant_id, changes=changes):
                    self.engine.tenancy.set_tenant(tenant_id, changes)
                case Shutdown():
                    return False
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                command = None
        return True

    def _wait(self) -> Command | _StepDone | None:
        if self.engine.is_step_done:
            timeout_s: float | None = 0.0
        elif (deadline_s := self.engine.next_deadline_s) is not None:
            timeout_s = max(0.0, deadline_s - self.engine.clock.now_s())
        else:
            timeout_s = None
        try:
            return self._inbox.get(timeout=timeout_s) if timeout_s else self._inbox.get(block=timeout_s is None)
        except queue.Empty:
            return None
