"""Stored chat completions: list, retrieve, update, delete, and the messages that were sent for one."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from pelton.serving.caller import tenant_of
from pelton.serving.context import ServingContext
from pelton.serving.errors import json_response
from pelton.serving.openai.stored_chat.archive import decode_completion, labels_of, labels_text, not_found
from pelton.serving.openai.stored_chat.objects import (
    CompletionChanges,
    CompletionList,
    CompletionsQuery,
    DeletedCompletion,
    StoredMessageList,
    StoredMessagesQuery,
)
from pelton.serving.query import read_query
from pelton.serving.request_body import read_json_body


async def list_chat_completions(context: ServingContext, http_request: Request) -> Response:
    query = read_query(http_request, CompletionsQuery, maps=("metadata",))
    table = await context.archive.table()
    records = await table.page(
        tenant_of(http_request),
        after=None if query.after is UNSET else query.after,
        limit=query.limit + 1,
        newest_first=query.order == "desc",
        model=None if query.model is UNSET else query.model,
        labels=labels_of(None if query.metadata is UNSET else query.metadata),
    )
    data = [decode_completion(record) for record in records[: query.limit]]
    first_id, last_id = (data[0].id, data[-1].id) if data else (None, None)
    has_more = len(records) > query.limit
    return json_response(CompletionList(data=data, first_id=first_id, last_id=last_id, has_more=has_more))


async def show_chat_completion(context: ServingContext, http_request: Request) -> Response:
    record = await context.archive.find(tenant_of(http_request), http_request.path_params["completion_id"])
    return json_response(decode_completion(record))


async def update_chat_completion(context: ServingContext, http_request: Request) -> Response:
    """Its metadata; nothing else of it can be changed."""
    changes = await read_json_body(http_request, CompletionChanges, context.config.max_body_bytes)
    tenant_id, completion_id = tenant_of(http_request), http_request.path_params["completion_id"]
    completion = decode_completion(await context.archive.find(tenant_id, completion_id))
    completion.metadata = changes.metadata or {}
    body, labels = msgspec.json.encode(completion), labels_text(changes.metadata)
    if not await (await context.archive.table()).update(tenant_id, completion_id, body, labels):
        raise not_found(completion_id)
    return json_response(completion)


async def delete_chat_completion(context: ServingContext, http_request: Request) -> Response:
    completion_id = http_request.path_params["completion_id"]
    if not await (await context.archive.table()).delete(tenant_of(http_request), completion_id):
        raise not_found(completion_id)
    return json_response(DeletedCompletion(id=completion_id))


async def list_stored_messages(context: ServingContext, http_request: Request) -> Response:
    query = read_query(http_request, StoredMessagesQuery)
    completion_id = http_request.path_params["completion_id"]
    record = await context.archive.find(tenant_of(http_request), completion_id)
    sent: list[dict[str, Any]] = msgspec.json.decode(record.messages)
    messages = [_listed(message, f"{completion_id}-{index}") for index, message in enumerate(sent)]
    if query.order == "desc":
        messages.reverse()
    start = 0
    if query.after is not UNSET:
        found = (index + 1 for index, message in enumerate(messages) if message["id"] == query.after)
        start = next(found, len(messages))
    page = messages[start : start + query.limit]
    first_id, last_id = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    has_more = start + query.limit < len(messages)
    return json_response(StoredMessageList(data=page, first_id=first_id, last_id=last_id, has_more=has_more))


def _listed(message: dict[str, Any], message_id: str) -> dict[str, Any]:
    content = message.get("content")
    parts = content if isinstance(content, list) else None
    text = None if parts is not None else content
    known = {name: value for name, value in message.items() if value is not None}
    return {**known, "id": message_id, "content": text, "content_parts": parts}
