"""`BatchJob`: one batch from its first look at the input to its last status."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from pelton.serving.batches.line_call import CallResult, call_endpoint, refusal
from pelton.serving.batches.lines import BadLine, Line, Scan, read_line, scan_input
from pelton.serving.batches.results import LineError, LineResponse, ResultFile, ResultLine, result_id
from pelton.serving.caller import IDENTITY_KEY
from pelton.serving.tenants.access import Identity
from pelton.serving.tenants.problems import ended_key
from pelton.store.batch_records import UNFINISHED, BatchRecord, BatchStatus, FileRecord
from pelton.store.batches import BatchTable, FileTable

if TYPE_CHECKING:
    from pelton.serving.batches.runner import BatchRunner

SAVE_S = 1.0
# Behind all that a tenant sends meanwhile; see `Request.rank_time_s`.
PRIORITY = 600
MAX_TIMEOUT_S = 24 * 3600.0
MIN_RETRY_S, MAX_RETRY_S = 0.2, 30.0
_RETRIED = (429, 503)
_HAVE_PRIORITY = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


class BatchJob:
    """The only writer of its record but for `cancelling`, which clients set."""

    def __init__(self, runner: BatchRunner, table: BatchTable, record: BatchRecord) -> None:
        self.record = record
        self._runner = runner
        self._table = table
        self._input = runner.files.path(record.input_file_id)
        self._output = ResultFile(runner.files.path(record.output_file_id))
        self._errors = ResultFile(runner.files.path(record.error_file_id))
        self._working: asyncio.Task[None] | None = None

    def cancel(self, record: BatchRecord) -> None:
        """A client has asked for it; `record` says when."""
        if self.record.status != "cancelling":
            self.record.status, self.record.times_s = "cancelling", self.record.times_s | record.times_s
            if self._working is not None:
                self._working.cancel()

    async def run(self) -> None:
        config = self._runner.context.config
        try:
            scan = await asyncio.to_thread(
                scan_input,
                self._input,
                self.record.endpoint,
                max_lines=config.max_batch_lines,
                max_line_bytes=config.max_body_bytes,
            )
            if scan.problem is not None:
                await self._fail(scan.problem)
                return
            lines = await self._begin(scan)
            if self.record.status != "cancelling":
                await self._work(lines)
            await self._end(scan)
        finally:
            self._output.close()
            self._errors.close()

    async def _begin(self, scan: Scan) -> list[Line]:
        """The lines without a result."""
        record = self.record
        if record.status == "validating":
            self._output.clear()
            self._errors.clear()
            for bad in scan.bad:
                self._errors.append(self._bad_result(bad))
            record.num_total, record.num_failed = len(scan.lines) + len(scan.bad), len(scan.bad)
            await self._enter("in_progress", ("validating",))
            return scan.lines
        done = await self._recover()
        return [line for line in scan.lines if line.number not in done]

    async def _recover(self) -> set[int]:
        done = await asyncio.to_thread(self._output.recover) | await asyncio.to_thread(self._errors.recover)
        self.record.num_completed, self.record.num_failed = self._output.num_lines, self._errors.num_lines
        return done

    async def _work(self, lines: Sequence[Line]) -> None:
        """Until all are done, the time is over, or somebody cancels."""
        self._working = asyncio.create_task(self._run_lines(lines))
        try:
            await self._working
        except asyncio.CancelledError:
            self._working.cancel()
            if self.record.status != "cancelling":
                raise  # the server ends
        finally:
            self._working = None

    async def _run_lines(self, lines: Sequence[Line]) -> None:
        rest = iter(lines)
        saving = asyncio.create_task(self._save_counts())
        try:
            async with asyncio.timeout(max(0.0, self.record.expires_s - time.time())), asyncio.TaskGroup() as group:
                for _ in range(min(len(lines), self._runner.context.config.batch_concurrency)):
                    group.create_task(self._run_some(rest))
        except TimeoutError:
            pass  # `_end` tells what is missing
        finally:
            saving.cancel()

    async def _run_some(self, rest: Iterator[Line]) -> None:
        runner = self._runner
        while True:
            async with runner.permits:
                await runner.turn()
                line = next(rest, None)
                if line is None:
                    return
                runner.num_calls += 1
                try:
                    await self._run_line(line)
                finally:
                    runner.num_calls -= 1

    async def _run_line(self, line: Line) -> None:
        record, request_id = self.record, uuid.uuid4().hex
        try:
            body = await self._body(line)
        except (msgspec.MsgspecError, RecursionError) as error:  # nested just too deeply for here
            problem = f"the line cannot be used: {error}"
            self._errors.append(self._bad_result(BadLine(line.number, line.custom_id, "invalid_json", problem)))
            record.num_failed += 1
            return
        result = await self._call(body, request_id)
        response = LineResponse(status_code=result.status, request_id=request_id, body=msgspec.Raw(result.body))
        answer = ResultLine(id=result_id(record.batch_id, line.number), custom_id=line.custom_id, response=response)
        # Written and counted without a pause in between: cancelling comes before or after both.
        if result.status == 200:
            self._output.append(answer)
            record.num_completed += 1
        else:
            self._errors.append(answer)
            record.num_failed += 1

    async def _body(self, line: Line) -> bytes:
        record = self.record
        body = (await asyncio.to_thread(read_line, self._input, line)).body
        if record.endpoint in _HAVE_PRIORITY:
            body.setdefault("priority", PRIORITY)
            body.setdefault("timeout_s", min(MAX_TIMEOUT_S, max(1.0, record.expires_s - time.time())))
        return msgspec.json.encode(body)

    async def _call(self, body: bytes, request_id: str) -> CallResult:
        record, access = self.record, self._runner.context.tenants.access
        while True:
            scope: dict[str, object] = {}
            if record.key_id:
                key = access.access.keys.get(record.key_id)
                problem = ended_key() if key is None else access.problem_of(key)
                if key is None or problem is not None:
                    return refusal(problem or ended_key())
                scope[IDENTITY_KEY] = Identity(record.tenant_id, record.key_id, key.scopes)
            result = await call_endpoint(
                self._runner.context,
                record.endpoint,
                body,
                request_id=request_id,
                headers=record.headers,
                scope=scope,
            )
            if result.status not in _RETRIED or b'"insufficient_quota"' in result.body:
                return result
            await asyncio.sleep(min(MAX_RETRY_S, max(MIN_RETRY_S, result.retry_after_s or 0.0)))
            await self._runner.turn()

    async def _save_counts(self) -> None:
        saved = -1
        while True:
            await asyncio.sleep(SAVE_S)
            num_done = self.record.num_completed + self.record.num_failed
            if num_done != saved and self.record.status == "in_progress":
                await self._table.save(self.record, only_from=("in_progress",))
                saved = num_done

    async def _end(self, scan: Scan) -> None:
        record = self.record
        last: BatchStatus = "cancelled"
        if record.status != "cancelling":
            last = "completed"
            done = await self._recover()
            missing = [line for line in scan.lines if line.number not in done]
            if missing:
                last = "expired"
                for line in missing:
                    problem = "the batch expired before the line could be run"
                    self._errors.append(
                        self._bad_result(BadLine(line.number, line.custom_id, "batch_expired", problem))
                    )
                    record.num_failed += 1
            if not await self._enter("finalizing", ("in_progress", "finalizing")):
                last = "cancelled"
        record.has_output = await self._publish(self._output, record.output_file_id, "output")
        record.has_errors = await self._publish(self._errors, record.error_file_id, "error")
        await self._enter(last, UNFINISHED)

    async def _publish(self, results: ResultFile, file_id: str, kind: str) -> bool:
        """Make a result file known; False where it is empty."""
        num_bytes = await asyncio.to_thread(results.finish)
        if not num_bytes:
            return False
        record, now_s = self.record, time.time()
        after_s = record.output_expires_after_s
        file = FileRecord(
            file_id=file_id,
            tenant_id=record.tenant_id,
            place=record.place,
            created_s=now_s,
            expires_s=None if after_s is None else now_s + after_s,
            filename=f"{record.batch_id}_{kind}.jsonl",
            purpose="batch_output",
            num_bytes=num_bytes,
        )
        await FileTable(await self._runner.context.store.database()).add(file)
        return True

    async def _fail(self, problem: BadLine) -> None:
        found = {"code": problem.code, "message": problem.message, "line": problem.number or None}
        self.record.problems = [found]
        await self._enter("failed", UNFINISHED)

    async def _enter(self, status: BatchStatus, only_from: Sequence[BatchStatus]) -> bool:
        """False, and the record says so, where a client has cancelled it meanwhile."""
        record = self.record
        before = record.status
        record.status = status
        record.times_s = record.times_s | {status: time.time()}
        if await self._table.save(record, only_from=only_from):
            return True
        record.times_s.pop(status)
        record.status = "cancelling" if before != "cancelling" else before
        return False

    def _bad_result(self, bad: BadLine) -> ResultLine:
        error = LineError(code=bad.code, message=bad.message, line=bad.number, param=bad.param)
        return ResultLine(
            id=result_id(self.record.batch_id, bad.number), custom_id=bad.custom_id, response=None, error=error
        )
