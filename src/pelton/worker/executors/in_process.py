"""`InProcessExecutor`: steps on one thread of this process, in the order they were submitted."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

from pelton.core.batch import ScheduledBatch, StepResult
from pelton.core.errors import EngineStepError
from pelton.core.protocols import BlockStore, KVConnector
from pelton.worker.adapters import LoadedAdapters
from pelton.worker.model_runner import ModelRunner, RunningStep
from pelton.worker.sampling.grammar import GrammarMatchers

_Job = tuple[ScheduledBatch, "Future[StepResult]"]


class InProcessExecutor:
    """Implements `core.protocols.Executor`. The thread is a daemon, so a stuck kernel cannot hold up an exit.

    A step that raises fails its own future; the next step runs. A queued step cannot be cancelled,
    because later ones were scheduled on the ground that it runs. While a device works on a step, the next one is
    begun behind it as soon as it comes; a second thread waits for the device.
    """

    def __init__(
        self,
        runner: ModelRunner,
        block_store: BlockStore | None = None,
        matchers: GrammarMatchers | None = None,
        adapters: LoadedAdapters | None = None,
        on_close: Callable[[], None] | None = None,
        connector: KVConnector | None = None,
    ) -> None:
        self._on_close = on_close
        self.connector = connector  # closed with the executor
        self.block_store = block_store  # closed with the executor, as are adapters
        self.matchers = matchers  # the runner's
        self.adapters = adapters
        self._jobs: SimpleQueue[_Job | RunningStep | None] = SimpleQueue()
        self._awaited: SimpleQueue[RunningStep | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, args=(runner,), name="pelton-executor", daemon=True)
        self._thread.start()

    def submit(self, batch: ScheduledBatch) -> Future[StepResult]:
        """Raises `EngineStepError` once closed."""
        future: Future[StepResult] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._closed:
                raise EngineStepError(f"step {batch.step_id} was submitted after the executor was closed")
            self._jobs.put((batch, future))
        return future

    def close(self) -> None:
        """Finish what is queued, then free the model and the KV cache. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()
        if self._on_close is not None:
            self._on_close()
            self._on_close = None
        if self.block_store is not None:
            self.block_store.close()
        if self.adapters is not None:
            self.adapters.close()
        if self.connector is not None:
            self.connector.close()

    def _run(self, runner: ModelRunner) -> None:
        running: deque[tuple[RunningStep, Future[StepResult]]] = deque()
        waiter: threading.Thread | None = None
        while (job := self._jobs.get()) is not None:
            if isinstance(job, RunningStep):
                _end(runner, running, job)
                continue
            batch, future = job
            try:
                step = runner.begin_step(batch)
            except BaseException as error:
                future.set_exception(error)
                continue
            running.append((step, future))
            if not step.is_done:
                if waiter is None:
                    waiter = threading.Thread(target=self._wait, name="pelton-device-wait", daemon=True)
                    waiter.start()
                self._awaited.put(step)
            _end(runner, running, None)
        if running:
            _end(runner, running, running[-1][0])
        self._awaited.put(None)

    def _wait(self) -> None:
        """Give steps back to the executor's thread once the device has done them."""
        while (step := self._awaited.get()) is not None:
            with contextlib.suppress(Exception):  # the executor's thread meets it again
                step.wait()
            self._jobs.put(step)


def _end(runner: ModelRunner, running: deque[tuple[RunningStep, Future[StepResult]]], last: RunningStep | None) -> None:
    """Answer the steps that are done, and all up to `last`, which the device has done."""
    while running and (running[0][0].is_done or (last is not None and not last.is_done)):
        step, future = running.popleft()
        try:
            result = runner.end_step(step)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
