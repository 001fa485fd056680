"""A line of a batch through the endpoint that it names: the same handler, checks, limits and accounting as by HTTP."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import Message

from pelton.core.errors import PeltonError
from pelton.serving.caller import BACKGROUND_KEY, REQUEST_ID_KEY
from pelton.serving.context import ServingContext
from pelton.serving.errors import error_response
from pelton.serving.logs import Logger

_log = Logger()


@dataclass(frozen=True, slots=True)
class CallResult:
    status: int
    body: bytes
    retry_after_s: float | None


def refusal(error: PeltonError) -> CallResult:
    """The answer of who was not let in."""
    response = error_response(error)
    return CallResult(response.status_code, bytes(response.body), None)


async def call_endpoint(
    context: ServingContext,
    path: str,
    body: bytes,
    *,
    request_id: str,
    headers: dict[str, str],
    scope: dict[str, object],
) -> CallResult:
    """Cancelling it ends the work within one step. `scope` says whose key it runs on."""
    from pelton.serving.routes import ROUTES  # which names the handlers of this very folder

    route = next(route for route in ROUTES if route.path == path and route.method == "POST")
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    never = asyncio.Event()

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await never.wait()  # nobody hangs up
        return {"type": "http.disconnect"}

    status, retry_after_s, parts = 500, None, []

    async def send(message: Message) -> None:
        nonlocal status, retry_after_s
        if message["type"] == "http.response.start":
            status = message["status"]
            for name, value in message["headers"]:
                if name.lower() == b"retry-after":
                    retry_after_s = float(value)
        else:
            parts.append(message.get("body", b""))

    http_scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "client": None,
        "server": None,
        REQUEST_ID_KEY: request_id,
        BACKGROUND_KEY: True,
        **scope,
    }
    try:
        response = await route.handler(context, Request(http_scope, receive))
        await response(http_scope, receive, send)
    except PeltonError as error:
        parts.clear()
        await error_response(error)(http_scope, receive, send)
    except Exception:
        _log.exception("unhandled error in a batch", request_id=request_id, path=path)
        parts.clear()
        await error_response(PeltonError("internal error"))(http_scope, receive, send)
    return CallResult(status, b"".join(parts), retry_after_s)
