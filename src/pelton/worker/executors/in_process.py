"""`InProcessExecutor`: steps on one thread of this process, in the order they were submitted."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from queue import SimpleQueue

from pelton.core.batch import ScheduledBatch, StepResult
from pelton.core.errors import EngineStepError
from pelton.core.protocols import BlockStore
from pelton.worker.adapters import LoadedAdapters
from pelton.worker.model_runner import ModelRunner
from pelton.worker.sampling.grammar import GrammarMatchers

_Job = tuple[ScheduledBatch, "Future[StepResult]"]


class InProcessExecutor:
    """Implements `core.protocols.Executor`. The thread is a daemon, so a stuck kernel cannot hold up an exit.

    A step that raises fails its own future; the next step runs. A queued step cannot be cancelled,
    because later ones were scheduled on the ground that it runs.
    """

    def __init__(
        self,
        runner: ModelRunner,
        block_store: BlockStore | None = None,
        matchers: GrammarMatchers | None = None,
        adapters: LoadedAdapters | None = None,
    ) -> None:
        self.block_store = block_store  # closed with the executor, as are adapters
        self.matchers = matchers  # the runner's
        self.adapters = adapters
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
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
        if self.block_store is not None:
            self.block_store.close()
        if self.adapters is not None:
            self.adapters.close()

    def _run(self, runner: ModelRunner) -> None:
        while (job := self._jobs.get()) is not None:
            batch, future = job
            try:
                result = runner.run_step(batch)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
