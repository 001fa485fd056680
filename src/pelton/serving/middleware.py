"""Around every request: its id, the key, timing, the access log, and the last net for errors."""

from __future__ import annotations

import re
import time
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pelton.core.errors import PeltonError
from pelton.serving.anthropic.errors import error_answer, is_anthropic
from pelton.serving.caller import IDENTITY_KEY, LOG_KEY, REQUEST_ID_KEY, RESPONSE_HEADERS_KEY
from pelton.serving.errors import ClientDisconnectedError
from pelton.serving.logs import Logger
from pelton.serving.metrics import ServerMetrics
from pelton.serving.sse import SERVER_SEND
from pelton.serving.tenants.access import AccessControl

# Probes carry no key; everything else does, where one is set.
OPEN_PATHS = frozenset({"/live", "/ready", "/health"})
CLIENT_CLOSED_REQUEST = 499  # nginx's status for the log; never sent
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_log = Logger()


def with_server_send(app: ASGIApp) -> ASGIApp:
    """Outermost: lets streams write past all other layers. See `SERVER_SEND`."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        scope[SERVER_SEND] = send
        await app(scope, receive, send)

    return call


class RequestMiddleware:
    def __init__(self, app: ASGIApp, *, access: AccessControl, metrics: ServerMetrics, root_path: str = "") -> None:
        self._app = app
        self._root_path = root_path
        self._access = access
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.perf_counter()
        if self._root_path and scope["path"].startswith(self._root_path + "/"):
            scope["path"] = scope["path"][len(self._root_path) :]
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        scope[REQUEST_ID_KEY] = request_id
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                elapsed_ms = round((time.perf_counter() - started_s) * 1000)
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", str(elapsed_ms).encode()),
                    *_extra_headers(scope, message),
                ]
                if is_anthropic(scope):
                    message["headers"].append((b"request-id", request_id.encode()))
            await send(message)

        try:
            await self._respond(scope, receive, send_with_headers, headers)
        except ClientDisconnectedError:
            status = CLIENT_CLOSED_REQUEST
        except Exception:
            _log.exception("unhandled error", request_id=request_id, path=scope["path"])
            if status:
                raise  # the server closes the connection, so that the client sees that the answer is broken
            await error_answer(scope, PeltonError("internal error"))(scope, receive, send_with_headers)
        finally:
            self._record(scope, request_id, status, time.perf_counter() - started_s)

    async def _respond(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        if scope["path"] not in OPEN_PATHS:
            try:
                scope[IDENTITY_KEY] = self._access.identify(headers, scope["path"], scope["method"])
            except PeltonError as error:
                await error_answer(scope, error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _record(self, scope: Scope, request_id: str, status: int, elapsed_s: float) -> None:
        route = scope.get("route")
        path = getattr(route, "path", "other")
        self._metrics.count_response(path, status)
        if path in OPEN_PATHS or path == "/metrics":
            return
        _log.info(
            "request",
            method=scope["method"],
            path=scope["path"][:256],
            status=status,
            elapsed_ms=round(elapsed_s * 1000, 1),
            request_id=request_id,
            **{name: value() if callable(value) else value for name, value in scope.get(LOG_KEY, {}).items()},
        )


def _extra_headers(scope: Scope, message: Message) -> list[tuple[bytes, bytes]]:
    """What handlers leave for whatever answers; an error that says the same itself is left alone."""
    known = {name for name, _ in message.get("headers", ())}
    found = scope.get(RESPONSE_HEADERS_KEY, {}).items()
    return [(name.encode(), value.encode()) for name, value in found if name.encode() not in known]
