"""`ResponseService`: the stored responses of this server, and those that run in the background."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from pelton.core.errors import ContextLengthExceededError, InvalidRequestError, PeltonError, RequestCancelledError
from pelton.serving.errors import HTTPProblemError, error_body
from pelton.serving.generation import Generation
from pelton.serving.openai.responses_api.builder import ResponseBuilder, response_of_item
from pelton.serving.openai.responses_api.items import InputItem
from pelton.serving.openai.responses_api.objects import RUNNING, ResponseError, ResponseObject
from pelton.serving.openai.responses_api.runs import BackgroundRun, EventLog
from pelton.store.opener import Store
from pelton.store.stored_response import StoredResponse

if TYPE_CHECKING:
    from pelton.store.responses import ResponseTable

MAX_CHAIN = 2048  # responses that go on from one another
MAX_CONVERSATION_BYTES = 64 << 20
PRUNE_EVERY = 64  # stored responses of a tenant
# A background response is another server's until it has not been renewed for this long.
LEASE_S = 15.0
RENEW_S = 4.0
CLOSE_TIMEOUT_S = 5.0
SEPARATOR = b"\n\n"


class ResponseService:
    """Used from one event loop. The database is opened with the first response that is stored or looked for.

    Responses are kept for `retention_s`, and of a tenant the latest `max_per_tenant`. `server_id`: no two servers have
    the same at a time, but one that is started again has it again, so that it knows at once what ran when it died.
    """

    def __init__(self, store: Store, *, retention_s: float, max_per_tenant: int, server_id: str) -> None:
        self._store = store
        self._server_id = server_id
        self._retention_s = retention_s
        self._max_per_tenant = max_per_tenant
        self._num_saved: Counter[str] = Counter()
        self._opened: ResponseTable | None = None
        self._runs: dict[str, BackgroundRun] = {}
        self._renewing: asyncio.Task[None] | None = None

    async def _table(self) -> ResponseTable:
        if self._opened is None:
            database = await self._store.database()
            from pelton.store.responses import ResponseTable

            self._opened = ResponseTable(database)
        return self._opened

    # -- keeping ------------------------------------------------------------------------------------------

    async def save(self, tenant_id: str, response: ResponseObject, input: Sequence[InputItem]) -> None:
        """Raises `PeltonError` where the database does not answer."""
        oldest_s = time.time() - self._retention_s
        record = _record(tenant_id, response, input)
        if response.status in RUNNING:
            lease_until_s = time.time() + LEASE_S
            record = replace(record, is_running=True, server_id=self._server_id, lease_until_s=lease_until_s)
        table = await self._table()
        await table.insert(record, oldest_s=oldest_s)
        self._num_saved[tenant_id] += 1
        if self._num_saved[tenant_id] % PRUNE_EVERY == 0:
            await table.prune(tenant_id, self._max_per_tenant)

    async def start_run(
        self,
        tenant_id: str,
        generation: Generation,
        builder: ResponseBuilder,
        input: Sequence[InputItem],
        is_streamed: bool,
    ) -> BackgroundRun:
        """Stored before it runs, so that it is known whatever happens to this process."""
        response = builder.response
        try:
            await self.save(tenant_id, response, input)
        except BaseException:
            generation.close()
            raise

        async def finish(response: ResponseObject, events: list[bytes]) -> None:
            try:
                await (await self._table()).update(_record(tenant_id, response, input, events if is_streamed else None))
            finally:
                del self._runs[response.id]

        run = self._runs[response.id] = BackgroundRun(tenant_id, generation, builder, finish, is_streamed=is_streamed)
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew())
        return run

    async def _renew(self) -> None:
        while self._runs:
            await asyncio.sleep(RENEW_S)
            try:
                await (await self._table()).renew(list(self._runs), time.time() + LEASE_S)
            except PeltonError:
                continue  # the database is away for a moment; the next try may come in time

    async def close(self) -> None:
        """Background responses have ended with the engine by now, and are stored."""
        for run in list(self._runs.values()):
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await run.wait()
            except TimeoutError:
                break
        if self._renewing is not None:
            self._renewing.cancel()

    # -- looking up ---------------------------------------------------------------------------------------

    def _run_of(self, tenant_id: str, response_id: str) -> BackgroundRun | None:
        run = self._runs.get(response_id)
        return run if run is not None and run.tenant_id == tenant_id else None

    async def find(self, tenant_id: str, response_id: str) -> StoredResponse:
        """Raises `HTTPProblemError` (404). A running one whose server died is failed from now on."""
        record = await (await self._table()).find(tenant_id, response_id)
        if record is None:
            raise not_found(response_id)
        if record.is_running and response_id not in self._runs and self._is_dead(record):
            response = decode_response(record)
            body = error_body(RequestCancelledError("the server ended while this response was running"))
            response.status = "failed"
            response.error = ResponseError(code="server_error", message=body.message)
            record = _record(tenant_id, response, decode_input(record))
            await (await self._table()).update(record)
        return record

    def _is_dead(self, record: StoredResponse) -> bool:
        return record.server_id == self._server_id or record.lease_until_s < time.time()

    async def response(self, tenant_id: str, response_id: str) -> ResponseObject:
        run = self._run_of(tenant_id, response_id)
        if run is not None:
            return run.builder.response
        return decode_response(await self.find(tenant_id, response_id))

    async def events(self, tenant_id: str, response_id: str) -> EventLog:
        run = self._run_of(tenant_id, response_id)
        if run is not None and run.is_streamed:
            return run.log
        record = await self.find(tenant_id, response_id)
        if record.events is None:
            raise InvalidRequestError(
                f"the events of {response_id} are not kept: only a response that was made with background=true and "
                "stream=true can be streamed again",
                param="stream",
            )
        parts = zlib.decompress(record.events).split(SEPARATOR)
        return EventLog([part + SEPARATOR for part in parts if part])

    async def cancel(self, tenant_id: str, response_id: str) -> ResponseObject:
        run = self._run_of(tenant_id, response_id)
        if run is not None:
            await run.cancel()
            return run.builder.response
        response = decode_response(await self.find(tenant_id, response_id))
        if not response.background:
            raise InvalidRequestError(
                f"{response_id} was not made with background=true; others are cancelled by closing the connection"
            )
        return response

    async def delete(self, tenant_id: str, response_id: str) -> None:
        run = self._run_of(tenant_id, response_id)
        if run is not None:
            await run.cancel()
        if not await (await self._table()).delete(tenant_id, response_id):
            raise not_found(response_id)

    # -- conversations ------------------------------------------------------------------------------------

    async def conversation(self, tenant_id: str, response_id: str | None) -> list[InputItem]:
        """All items up to and with the response, the oldest first. Raises `InvalidRequestError`."""
        turns: list[list[InputItem]] = []
        previous_id, num_bytes = response_id, 0
        while response_id is not None:
            record = await (await self._table()).find(tenant_id, response_id)
            if record is None:
                raise HTTPProblemError(
                    400,
                    f"there is no stored response {response_id[:128]!r} to go on from",
                    code="previous_response_not_found",
                    param="previous_response_id",
                )
            response = await self.response(tenant_id, response_id)
            if response.status in RUNNING:
                raise InvalidRequestError(
                    f"{response_id} is {response.status}; go on from it once it has ended", param="previous_response_id"
                )
            num_bytes += len(record.body) + len(record.input)
            if num_bytes > MAX_CONVERSATION_BYTES:
                raise ContextLengthExceededError(
                    f"the conversation up to {previous_id} is larger than {MAX_CONVERSATION_BYTES} bytes",
                    param="previous_response_id",
                )
            turns.append([*decode_input(record), *output_as_input(response)])
            if len(turns) > MAX_CHAIN:
                raise InvalidRequestError(
                    f"more than {MAX_CHAIN} responses go on from one another; begin anew", param="previous_response_id"
                )
            response_id = record.previous_response_id
        return [item for turn in reversed(turns) for item in turn]

    async def resolve(self, tenant_id: str, items: Sequence[InputItem]) -> list[InputItem]:
        """With each reference replaced by the item of an earlier response that it means."""
        found: dict[str, list[InputItem]] = {}
        resolved = []
        for index, item in enumerate(items):
            if item.type != "item_reference" and not (item.type is None and item.role is None):
                resolved.append(item)
                continue
            response_id = response_of_item(item.id or "")
            if response_id is not None and response_id not in found:
                record = await (await self._table()).find(tenant_id, response_id)
                found[response_id] = output_as_input(decode_response(record)) if record is not None else []
            match = next((other for other in found.get(response_id or "", ()) if other.id == item.id), None)
            if match is None:
                raise InvalidRequestError(
                    f"input[{index}] refers to {(item.id or '')[:128]!r}, which no stored response has made",
                    param=f"input[{index}].id",
                )
            resolved.append(match)
        return resolved


def _record(
    tenant_id: str, response: ResponseObject, input: Sequence[InputItem], events: list[bytes] | None = None
) -> StoredResponse:
    return StoredResponse(
        response_id=response.id,
        tenant_id=tenant_id,
        created_s=response.created_at,
        body=msgspec.json.encode(response),
        input=msgspec.json.encode(input),
        previous_response_id=response.previous_response_id,
        events=zlib.compress(b"".join(events), 1) if events is not None else None,
    )


def decode_response(record: StoredResponse) -> ResponseObject:
    return msgspec.json.decode(record.body, type=ResponseObject)


def decode_input(record: StoredResponse) -> list[InputItem]:
    return msgspec.json.decode(record.input, type=list[InputItem])


def output_as_input(response: ResponseObject) -> list[InputItem]:
    """A call that was cut off has no arguments that a template could write."""
    items = msgspec.convert(msgspec.to_builtins(response.output), list[InputItem])
    return [item for item in items if item.type != "function_call" or item.status == "completed"]


def not_found(response_id: str) -> HTTPProblemError:
    return HTTPProblemError(404, f"there is no response {response_id[:128]!r}", code="response_not_found")
