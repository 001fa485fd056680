"""POST and GET /v1/files, GET and DELETE /v1/files/{file_id}, GET /v1/files/{file_id}/content."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from msgspec import UNSET
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.types import Message

from pelton.core.errors import InvalidRequestError, ServiceUnavailableError
from pelton.serving.batches.file_store import new_file_id
from pelton.serving.batches.objects import (
    MAX_EXPIRY_S,
    MIN_EXPIRY_S,
    DeletedFile,
    FileList,
    FilesQuery,
    file_object,
)
from pelton.serving.caller import tenant_of
from pelton.serving.context import ServingContext
from pelton.serving.errors import ClientDisconnectedError, HTTPProblemError, json_response
from pelton.serving.query import read_query
from pelton.store.batch_records import FileRecord

UPLOAD_TIMEOUT_S = 600.0
MAX_FIELDS, MAX_FIELD_BYTES, MAX_NAME_LENGTH = 8, 4096, 255
# Of the multipart frame around a file.
FRAME_BYTES = 1 << 16
PURPOSES = ("batch",)
_FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")


@dataclass(frozen=True, slots=True)
class _Upload:
    file: UploadFile
    purpose: str
    expires_after_s: int | None


async def upload_file(context: ServingContext, http_request: Request) -> Response:
    from pelton.store.batches import FileTable

    tenant_id = tenant_of(http_request)
    most = context.config.max_file_bytes
    form = await _read_form(http_request, most)
    try:
        upload = _check_form(form)
        if (upload.file.size or 0) > most:
            raise _too_large(most)
        table = FileTable(await context.store.database())
        if await table.num_bytes(tenant_id) + (upload.file.size or 0) > context.config.max_stored_bytes:
            raise HTTPProblemError(
                413,
                f"the tenant's files would take more than {context.config.max_stored_bytes} bytes; delete some",
                code="storage_exceeded",
            )
        store, file_id, now_s = context.batches.files, new_file_id(), time.time()
        try:
            num_bytes = await asyncio.to_thread(store.save, file_id, upload.file.file)
        except OSError as error:
            raise ServiceUnavailableError(f"the file could not be stored: {error.strerror}") from error
        record = FileRecord(
            file_id=file_id,
            tenant_id=tenant_id,
            place=store.place,
            created_s=now_s,
            expires_s=None if upload.expires_after_s is None else now_s + upload.expires_after_s,
            filename=upload.file.filename or "upload.jsonl",
            purpose=upload.purpose,
            num_bytes=num_bytes,
        )
        await table.add(record)
    finally:
        await form.close()
    return json_response(file_object(record))


async def _read_form(request: Request, max_bytes: int) -> FormData:
    """Raises `HTTPProblemError` (408, 413, 415) or `InvalidRequestError`."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "multipart/form-data":
        raise HTTPProblemError(
            415, f"content-type is {content_type!r}; it must be multipart/form-data", code="unsupported_media_type"
        )
    num_bytes = 0

    async def receive() -> Message:
        nonlocal num_bytes
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_bytes + FRAME_BYTES:
            raise _too_large(max_bytes)
        return message

    bounded = Request(request.scope, receive)
    try:
        async with asyncio.timeout(UPLOAD_TIMEOUT_S):
            return await bounded.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    except TimeoutError:
        raise HTTPProblemError(
            408, "the upload took too long", code="request_timeout", headers={"connection": "close"}
        ) from None
    except (MultiPartException, HTTPException, KeyError, ValueError) as error:
        problem = getattr(error, "detail", None) or getattr(error, "message", None) or str(error)
        raise InvalidRequestError(f"the form is not usable: {problem}", code="invalid_form") from None


def _check_form(form: FormData) -> _Upload:
    for name, _ in form.multi_items():
        if name not in _FIELDS:
            raise InvalidRequestError(
                f"unknown parameter {name[:64]!r}; there are {', '.join(_FIELDS)}",
                param=name[:64],
                code="unknown_parameter",
            )
        if len(form.getlist(name)) > 1:
            raise InvalidRequestError(f"{name} is there twice", param=name)
    file, purpose = form.get("file"), form.get("purpose")
    if not isinstance(file, UploadFile):
        raise InvalidRequestError(
            "file is required, as a part with a filename", param="file", code="missing_required_parameter"
        )
    if len(file.filename or "") > MAX_NAME_LENGTH or not (file.filename or "x").isprintable():
        raise InvalidRequestError(f"the filename must be at most {MAX_NAME_LENGTH} printable characters", param="file")
    if purpose is None:
        raise InvalidRequestError("purpose is required", param="purpose", code="missing_required_parameter")
    if purpose not in PURPOSES:
        raise InvalidRequestError(
            f"purpose is {str(purpose)[:64]!r}; files are for batches here: it must be 'batch'", param="purpose"
        )
    return _Upload(file, purpose, _expires_after_s(form))


def _expires_after_s(form: FormData) -> int | None:
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequestError("expires_after[anchor] must be 'created_at'", param="expires_after[anchor]")
    text = seconds if isinstance(seconds, str) else ""
    if not (text.isascii() and text.isdecimal() and len(text) < 9 and MIN_EXPIRY_S <= int(text) <= MAX_EXPIRY_S):
        raise InvalidRequestError(
            f"expires_after[seconds] must be a number from {MIN_EXPIRY_S} to {MAX_EXPIRY_S}",
            param="expires_after[seconds]",
        )
    return int(text)


def _too_large(most: int) -> HTTPProblemError:
    return HTTPProblemError(
        413, f"the file is larger than {most} bytes", code="request_too_large", headers={"connection": "close"}
    )


async def list_files(context: ServingContext, http_request: Request) -> Response:
    from pelton.store.batches import FileTable

    query = read_query(http_request, FilesQuery)
    limit = query.limit
    records = await FileTable(await context.store.database()).page(
        tenant_of(http_request),
        time.time(),
        after=query.after or None,
        limit=limit + 1,
        newest_first=query.order == "desc",
        purpose=None if query.purpose is UNSET else query.purpose,
    )
    data = [file_object(record) for record in records[:limit]]
    return json_response(
        FileList(
            data=data,
            has_more=len(records) > limit,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
        )
    )


async def show_file(context: ServingContext, http_request: Request) -> Response:
    return json_response(file_object(await _find(context, http_request)))


async def show_content(context: ServingContext, http_request: Request) -> Response:
    record = await _find(context, http_request)
    path = context.batches.files.path(record.file_id)
    if not await asyncio.to_thread(path.is_file):
        raise HTTPProblemError(404, f"the content of {record.file_id} is not on this server", code="file_not_found")
    return FileResponse(path, media_type="application/octet-stream")


async def delete_file(context: ServingContext, http_request: Request) -> Response:
    from pelton.store.batches import BatchTable, FileTable

    record = await _find(context, http_request)
    database = await context.store.database()
    if await BatchTable(database).num_unfinished(record.tenant_id, record.file_id):
        raise HTTPProblemError(
            409, f"a batch reads {record.file_id}; cancel the batch first", code="file_in_use", param="file_id"
        )
    await FileTable(database).delete(record.tenant_id, record.file_id)
    await asyncio.to_thread(context.batches.files.remove, record.file_id)
    return json_response(DeletedFile(id=record.file_id))


async def _find(context: ServingContext, http_request: Request) -> FileRecord:
    from pelton.store.batches import FileTable

    file_id = http_request.path_params["file_id"]
    table = FileTable(await context.store.database())
    record = await table.get(tenant_of(http_request), file_id[:64], time.time())
    if record is None:
        raise HTTPProblemError(404, f"there is no file {file_id[:64]!r}", code="file_not_found", param="file_id")
    return record
