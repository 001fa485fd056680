"""POST and GET /v1/batches, GET /v1/batches/{batch_id}, POST /v1/batches/{batch_id}/cancel."""

from __future__ import annotations

import asyncio
import time
import uuid

from starlette.requests import Request
from starlette.responses import Response

from pelton.core.errors import InvalidRequestError
from pelton.serving.batches.file_store import new_file_id
from pelton.serving.batches.lines import ENDPOINTS
from pelton.serving.batches.objects import BatchesQuery, BatchList, BatchRequest, batch_object
from pelton.serving.caller import identity_of, tenant_of
from pelton.serving.context import ServingContext
from pelton.serving.errors import HTTPProblemError, json_response
from pelton.serving.query import read_query
from pelton.serving.request_body import read_json_body
from pelton.store.batch_records import BatchRecord

MAX_WINDOW_S = 30 * 24 * 3600
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}
# Of a tenant, that have not ended.
MAX_UNFINISHED = 100


async def create_batch(context: ServingContext, http_request: Request) -> Response:
    tenant_id = tenant_of(http_request)
    request = await read_json_body(http_request, BatchRequest, context.config.max_body_bytes)
    endpoints = _endpoints()
    if request.endpoint not in endpoints:
        raise InvalidRequestError(
            f"endpoint is {request.endpoint[:100]!r}; it may be {', '.join(endpoints)}", param="endpoint"
        )
    window_s = int(request.completion_window[:-1]) * _UNITS_S[request.completion_window[-1]]
    if window_s > MAX_WINDOW_S:
        raise InvalidRequestError(
            f"completion_window is {request.completion_window}; it may be 30d at most", param="completion_window"
        )
    from pelton.store.batches import BatchTable, FileTable

    database = await context.store.database()
    now_s = time.time()
    file = await FileTable(database).get(tenant_id, request.input_file_id, now_s)
    if file is None or file.purpose != "batch":
        raise InvalidRequestError(
            f"there is no file {request.input_file_id!r} of purpose 'batch'", param="input_file_id"
        )
    table = BatchTable(database)
    if await table.num_unfinished(tenant_id) >= MAX_UNFINISHED:
        raise HTTPProblemError(
            429,
            f"{MAX_UNFINISHED} batches have not ended, as many as allowed; try again later",
            code="rate_limit_exceeded",
        )
    record = BatchRecord(
        batch_id=f"batch_{uuid.uuid4().hex}",
        tenant_id=tenant_id,
        place=await asyncio.to_thread(lambda: context.batches.files.place),
        created_s=now_s,
        status="validating",
        input_file_id=request.input_file_id,
        endpoint=request.endpoint,
        completion_window=request.completion_window,
        expires_s=now_s + window_s,
        output_file_id=new_file_id(),
        error_file_id=new_file_id(),
        key_id=identity_of(http_request).key_id,
        headers={"content-type": "application/json", "x-tenant-id": tenant_id},
        output_expires_after_s=None if request.output_expires_after is None else request.output_expires_after.seconds,
        metadata=request.metadata,
    )
    await table.add(record)
    context.batches.wake()
    return json_response(batch_object(record))


def _endpoints() -> tuple[str, ...]:
    """Those that this server has."""
    from pelton.serving.routes import ROUTES  # which names the handlers of this file

    served = {route.path for route in ROUTES if route.method == "POST"}
    return tuple(path for path in ENDPOINTS if path in served)


async def list_batches(context: ServingContext, http_request: Request) -> Response:
    from pelton.store.batches import BatchTable

    query = read_query(http_request, BatchesQuery)
    limit, after = query.limit, query.after or None
    table = BatchTable(await context.store.database())
    records = await table.page(tenant_of(http_request), after=after, limit=limit + 1)
    data = [batch_object(context.batches.live(record)) for record in records[:limit]]
    return json_response(
        BatchList(
            data=data,
            has_more=len(records) > limit,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
        )
    )


async def show_batch(context: ServingContext, http_request: Request) -> Response:
    record = await _find(context, http_request)
    return json_response(batch_object(context.batches.live(record)))


async def cancel_batch(context: ServingContext, http_request: Request) -> Response:
    """It ends soon after; results so far are kept."""
    from pelton.store.batches import BatchTable

    record = await _find(context, http_request)
    if record.status in ("validating", "in_progress"):
        live = context.batches.live(record)
        record.num_total, record.num_completed, record.num_failed = live.num_total, live.num_completed, live.num_failed
        record.status = "cancelling"
        record.times_s["cancelling"] = time.time()
        table = BatchTable(await context.store.database())
        if not await table.save(record, only_from=("validating", "in_progress")):
            record = await _find(context, http_request)
        context.batches.wake()
    elif record.status not in ("cancelling", "cancelled"):
        raise HTTPProblemError(409, f"the batch is {record.status}; it cannot be cancelled", code="batch_not_running")
    return json_response(batch_object(record))


async def _find(context: ServingContext, http_request: Request) -> BatchRecord:
    from pelton.store.batches import BatchTable

    batch_id = http_request.path_params["batch_id"]
    record = await BatchTable(await context.store.database()).get(tenant_of(http_request), batch_id[:64])
    if record is None:
        raise HTTPProblemError(404, f"there is no batch {batch_id[:64]!r}", code="batch_not_found", param="batch_id")
    return record
