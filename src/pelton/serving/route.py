"""One row of the table of routes (`routes.py`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pelton.serving.context import ServingContext
from pelton.serving.errors import ErrorResponse

BODY_ERRORS = (400, 401, 403, 404, 408, 413, 415)
GENERATION_ERRORS = (*BODY_ERRORS, 429, 500, 503)

Handler = Callable[[ServingContext, Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    method: str
    path: str
    handler: Handler
    summary: str
    answer: type[msgspec.Struct] | None = None  # None: text
    body: type[msgspec.Struct] | None = None
    query: type[msgspec.Struct] | None = None
    chunk: type[msgspec.Struct] | None = None  # of its stream
    item: type[msgspec.Struct] | None = None  # the answer may be a list of these
    errors: tuple[int, ...] = ()
    error: type[msgspec.Struct] = ErrorResponse
    is_admin: bool = False  # needs a key of the scope `admin`, always
    is_open: bool = False  # needs no key
    has_tenant: bool = False  # is answered for the tenant that asks
    form: dict[str, Any] | None = None  # schema of a body that is a multipart form
    media_type: str = "text/plain"  # of an answer that is no JSON
