"""What a tenant may ask about its own: sessions, and the timeline of a request."""

from __future__ import annotations

import time
from typing import Literal

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from pelton.core.session import SessionInfo
from pelton.serving.caller import tenant_of
from pelton.serving.context import ServingContext
from pelton.serving.errors import HTTPProblemError, json_response


class SessionItem(Struct, kw_only=True):
    id: str
    program_id: str
    is_inferred: bool  # found by its prefix, not named by the client
    created: float
    last_used: float
    num_turns: int
    num_running: int
    num_context_tokens: int
    num_pinned_blocks: int
    pin_expires_in_s: float | None  # null: nothing is pinned
    object: Literal["session"] = "session"


class SessionList(Struct, kw_only=True):
    data: list[SessionItem]
    object: Literal["list"] = "list"


class DeletedSession(Struct, kw_only=True):
    id: str
    deleted: bool = True
    object: Literal["session.deleted"] = "session.deleted"


async def list_sessions(context: ServingContext, request: Request) -> Response:
    """The latest used first."""
    now_s = time.time()
    sessions = await context.client.sessions(tenant_of(request))
    return json_response(SessionList(data=[_item(info, now_s) for info in sessions]))


async def delete_session(context: ServingContext, request: Request) -> Response:
    """Its KV is given up; requests under way go on."""
    session_id = request.path_params["session_id"]
    if not await context.client.delete_session(tenant_of(request), session_id):
        raise HTTPProblemError(404, f"there is no session {session_id[:512]!r}", code="session_not_found")
    return json_response(DeletedSession(id=session_id))


async def show_timeline(context: ServingContext, request: Request) -> Response:
    request_id = request.path_params["request_id"]
    timeline = context.timelines.find(tenant_of(request), request_id)
    if timeline is None:
        raise HTTPProblemError(
            404,
            f"nothing is known of request {request_id[:512]!r}; timelines are kept for the latest requests only",
            code="request_not_found",
        )
    return json_response(timeline)


def _item(info: SessionInfo, now_s: float) -> SessionItem:
    return SessionItem(
        id=info.session_id,
        program_id=info.program_id,
        is_inferred=info.is_inferred,
        created=now_s - info.age_s,
        last_used=now_s - info.idle_s,
        num_turns=info.num_turns,
        num_running=info.num_running,
        num_context_tokens=info.num_context_tokens,
        num_pinned_blocks=info.num_pinned_blocks,
        pin_expires_in_s=info.pin_expires_in_s,
    )
