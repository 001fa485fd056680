"""`BatchRunner`: the batches of this data directory, run beside interactive requests and behind them.

One process at a time has the folder's lock, which the system takes back when it ends: the next one goes on where
the output and error files stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, BinaryIO

from pelton.core.errors import PeltonError
from pelton.engine.client import EngineState
from pelton.serving.batches.file_store import FileStore
from pelton.serving.logs import Logger
from pelton.store.batch_records import BatchRecord

if TYPE_CHECKING:
    from pelton.serving.batches.job import BatchJob
    from pelton.serving.context import ServingContext

POLL_S = 5.0
POLLS_PER_CLEANING = 12
WAIT_S = 0.05
# Batches of which some lines run; others wait for their turn.
MAX_JOBS = 32
_log = Logger()


class BatchRunner:
    def __init__(self, context: ServingContext, files: FileStore) -> None:
        self.context = context
        self.files = files
        self.permits = asyncio.Semaphore(context.config.batch_concurrency)
        self.num_calls = 0  # lines that are with the engine
        self._jobs: dict[str, tuple[BatchJob, asyncio.Task[None]]] = {}
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    def start_if_used(self) -> None:
        """At the server's start: a server without files has nothing to go on with."""
        if self.files.exists:
            self.wake()

    def wake(self) -> None:
        """There is a new batch, or one to be cancelled."""
        self._wake.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stops where it is; the next start goes on."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def live(self, record: BatchRecord) -> BatchRecord:
        """`record` as it is now, where it runs here."""
        found = self._jobs.get(record.batch_id)
        if found is not None and record.status == found[0].record.status:
            return found[0].record
        return record

    async def turn(self) -> None:
        """Until another line may start: few do while others use the engine."""
        client = self.context.client

        access = self.context.tenants.access

        def must_wait() -> bool:
            is_ready = client.state is EngineState.READY and not access.is_loading
            return not is_ready or 0 < self.num_calls < client.num_requests

        while must_wait():  # noqa: ASYNC110 - of what the engine does there is no event
            await asyncio.sleep(WAIT_S)

    async def _run(self) -> None:
        lock: BinaryIO | None = None
        num_polls = 0
        try:
            while True:
                self._wake.clear()
                try:
                    lock = lock or await asyncio.to_thread(self.files.try_lock)
                    if lock is not None:
                        await self._look()
                        if num_polls % POLLS_PER_CLEANING == 0:
                            await self._clean()
                    num_polls += 1
                except (PeltonError, OSError) as error:
                    _log.warning("batches wait", problem=str(error))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), POLL_S)
        finally:
            tasks = [task for _, task in self._jobs.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if lock is not None:
                lock.close()

    async def _look(self) -> None:
        from pelton.serving.batches.job import BatchJob
        from pelton.store.batches import BatchTable

        table = BatchTable(await self.context.store.database())
        for record in await table.unfinished(await asyncio.to_thread(lambda: self.files.place)):
            found = self._jobs.get(record.batch_id)
            if found is not None:
                if record.status == "cancelling":
                    found[0].cancel(record)
            elif len(self._jobs) < MAX_JOBS:
                job = BatchJob(self, table, record)
                self._jobs[record.batch_id] = (job, asyncio.create_task(self._run_job(job)))

    async def _run_job(self, job: BatchJob) -> None:
        try:
            await job.run()
        except Exception:  # whatever it is: it is tried again with the next look
            _log.exception("a batch stopped", batch_id=job.record.batch_id)
            await asyncio.sleep(POLL_S)
        finally:
            del self._jobs[job.record.batch_id]

    async def _clean(self) -> None:
        from pelton.store.batches import FileTable

        place = await asyncio.to_thread(lambda: self.files.place)
        for file_id in await FileTable(await self.context.store.database()).delete_expired(place, time.time()):
            await asyncio.to_thread(self.files.remove, file_id)
