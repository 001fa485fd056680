"""Typed errors as HTTP: one envelope, one table of statuses.

Every failure a client sees is `{"error": {"message", "type", "param", "code"}}`, the shape of the
OpenAI API (https://platform.openai.com/docs/guides/error-codes).
"""

from __future__ import annotations

import math

import msgspec
from starlette.responses import Response

from pelton.core.errors import (
    DeadlineExceededError,
    DeadlineUnreachableError,
    EngineDeadError,
    InvalidRequestError,
    ModelNotFoundError,
    PeltonError,
    QueueFullError,
    RequestCancelledError,
    ServiceUnavailableError,
    TenantLimitError,
)

MAX_MESSAGE_LENGTH = 2000


class ErrorBody(msgspec.Struct, kw_only=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct, kw_only=True):
    error: ErrorBody


class HTTPProblemError(PeltonError):
    """A request that fails in HTTP itself: route, method, key, body."""

    code = "invalid_request"

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers or {}


class ClientDisconnectedError(Exception):
    """The client went away before its response was complete; nobody is left to answer."""


# Most specific first. An expired deadline is 408, not 5xx: the limit was part of the request.
_STATUSES: tuple[tuple[type[PeltonError], int], ...] = (
    (InvalidRequestError, 400),
    (ModelNotFoundError, 404),
    (DeadlineExceededError, 408),
    (TenantLimitError, 429),
    (DeadlineUnreachableError, 429),
    (QueueFullError, 503),
    (ServiceUnavailableError, 503),
    (EngineDeadError, 503),
    (RequestCancelledError, 503),
)
DEFAULT_RETRY_AFTER_S = 1.0


def status_of(error: PeltonError) -> int:
    if isinstance(error, HTTPProblemError):
        return error.status
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)


def error_body(error: PeltonError) -> ErrorBody:
    message = str(error) or error.code
    if len(message) > MAX_MESSAGE_LENGTH:
        message = message[:MAX_MESSAGE_LENGTH] + "..."
    return ErrorBody(
        message=message,
        type=getattr(error, "kind", None) or _type_of(status_of(error)),
        param="model" if isinstance(error, ModelNotFoundError) else getattr(error, "param", None),
        code=error.code,
    )


def _type_of(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def error_headers(error: PeltonError) -> dict[str, str]:
    status = status_of(error)
    headers: dict[str, str] = {}
    if status in (429, 503):
        # Whole seconds: the header allows nothing finer.
        retry_after_s = getattr(error, "retry_after_s", DEFAULT_RETRY_AFTER_S)
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    if isinstance(error, DeadlineExceededError):
        # The openai client would send it again on its own, and the work would be lost twice.
        headers["x-should-retry"] = "false"
    if isinstance(error, HTTPProblemError):
        headers.update(error.headers)
    return headers


def error_response(error: PeltonError) -> Response:
    return json_response(ErrorResponse(error=error_body(error)), status_of(error), error_headers(error))


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")
