"""Anthropic's error envelope: everything that goes wrong below /v1/messages wears it.

https://docs.anthropic.com/en/api/errors
"""

from __future__ import annotations

import msgspec
from starlette.responses import Response
from starlette.types import Scope

from pelton.core.errors import PeltonError
from pelton.serving.caller import REQUEST_ID_KEY
from pelton.serving.errors import error_body, error_headers, error_response, json_response, status_of

PATH = "/v1/messages"
_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class AnthropicErrorDetails(msgspec.Struct, kw_only=True):
    """By which the official client knows that it has to send the whole conversation, and does."""

    error_code: str = "thread_unsupported_request"
    unsupported: tuple[str, ...] = ("thread",)


class AnthropicErrorBody(msgspec.Struct, kw_only=True):
    type: str
    message: str
    details: AnthropicErrorDetails | msgspec.UnsetType = msgspec.UNSET


class AnthropicError(msgspec.Struct, kw_only=True):
    type: str = "error"
    error: AnthropicErrorBody
    request_id: str | None = None


def is_anthropic(scope: Scope) -> bool:
    path: str = scope["path"]
    return path == PATH or path.startswith(PATH + "/")


def anthropic_error(error: PeltonError, request_id: str | None = None) -> AnthropicError:
    status = status_of(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    body = error_body(error)
    # The envelope has no other place for it.
    message = body.message if body.param is None or body.param in body.message else f"{body.param}: {body.message}"
    details = AnthropicErrorDetails() if body.param == "thread" else msgspec.UNSET
    return AnthropicError(error=AnthropicErrorBody(type=kind, message=message, details=details), request_id=request_id)


def error_answer(scope: Scope, error: PeltonError) -> Response:
    """The error in the envelope of the API that was called."""
    if not is_anthropic(scope):
        return error_response(error)
    return json_response(anthropic_error(error, scope.get(REQUEST_ID_KEY)), status_of(error), error_headers(error))
