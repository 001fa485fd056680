"""Who asks: tenant, session and program, from headers and from fields of the body.

Ids are a tenant's own, so a tenant can neither see nor touch another's sessions, whatever it sends. A key of ours
says which tenant its owner is; where there are none, a client is the tenant that it says it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from pelton.core.errors import InvalidRequestError
from pelton.core.request import DEFAULT_TENANT
from pelton.serving.errors import HTTPProblemError
from pelton.serving.openai.pooling_requests import PoolingRequest
from pelton.serving.openai.requests import ChatMessage, GenerationRequest
from pelton.serving.tenants.access import ANYBODY, Identity

LOG_KEY = "pelton.log"  # of an ASGI scope: what the request's log line says beyond HTTP
REQUEST_ID_KEY = "pelton.request_id"  # of an ASGI scope
BACKGROUND_KEY = "pelton.background"  # of an ASGI scope
IDENTITY_KEY = "pelton.identity"  # of an ASGI scope: whose key it was
RESPONSE_HEADERS_KEY = "pelton.response_headers"  # of an ASGI scope: what every answer to it carries
TENANT_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}"
ID_PATTERN = r"[\x21-\x7e]{1,512}"
MAX_TOOL_NAMES = 16
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


@dataclass(frozen=True, slots=True)
class Caller:
    tenant_id: str
    session_id: str | None
    program_id: str | None
    previous_answer_id: str | None
    request_id: str  # of the HTTP request
    log: dict[str, Any]
    key_id: str = ""  # of the API key; empty where none of ours was sent
    response_headers: dict[str, str] = field(default_factory=dict)
    is_background: bool = False  # a line of a batch

    def salt(self, cache_salt: str | None, cache_group: str | None = None) -> str:
        """Prefixes are shared within a tenant and, where it sends one, a salt; across tenants within a group only."""
        if cache_group is not None:
            return f"group:{len(cache_group)}:{cache_group}:{cache_salt or ''}"
        if self.tenant_id == DEFAULT_TENANT and not cache_salt:
            return ""
        return f"{len(self.tenant_id)}:{self.tenant_id}:{cache_salt or ''}"


def caller_of(request: Request, body: GenerationRequest | PoolingRequest) -> Caller:
    """Raises `InvalidRequestError` for a header that is malformed or there twice."""
    tenant_id = tenant_of(request)
    session_id = _header(request, "X-Session-Id", ID_PATTERN, "1 to 512 printable ASCII characters without spaces")
    program_id = _header(request, "X-Program-Id", ID_PATTERN, "1 to 512 printable ASCII characters without spaces")
    log = request.scope.setdefault(LOG_KEY, {})
    log["tenant"] = tenant_id
    if body.user is not None:
        log["user"] = body.user
    return Caller(
        tenant_id,
        session_id or body.prompt_cache_key or None,
        program_id,
        body.previous_response_id,
        request.scope.get(REQUEST_ID_KEY, ""),
        log,
        identity_of(request).key_id,
        request.scope.setdefault(RESPONSE_HEADERS_KEY, {}),
        is_background=request.scope.get(BACKGROUND_KEY, False),
    )


def identity_of(request: Request) -> Identity:
    identity: Identity = request.scope.get(IDENTITY_KEY, ANYBODY)
    return identity


def tenant_of(request: Request) -> str:
    """The owner of the request's key, or whom the header names.

    Raises `InvalidRequestError` for a header that is malformed or there twice, `HTTPProblemError` for another's name.
    """
    expected = "1 to 128 letters, digits or ._:@- and start with a letter or digit"
    named = _header(request, "X-Tenant-Id", TENANT_PATTERN, expected)
    owner = identity_of(request).tenant_id
    if owner is None:
        return named or DEFAULT_TENANT
    if named not in (None, owner):
        raise HTTPProblemError(
            403, "the API key belongs to another tenant than X-Tenant-Id names", code="tenant_mismatch"
        )
    return owner


def _header(request: Request, name: str, pattern: str, expected: str) -> str | None:
    values = request.headers.getlist(name)
    if not values:
        return None
    if len(values) > 1:  # a proxy and a client that mean different ones, say
        raise InvalidRequestError(f"{name} is there {len(values)} times; send it once", param=name)
    if not re.fullmatch(pattern, values[0]):
        raise InvalidRequestError(f"{name} must be {expected}", param=name)
    return values[0]


def answered_tools(messages: Sequence[ChatMessage]) -> tuple[str, ...]:
    """Names of the tools whose results a conversation ends with, each once; none where it ends otherwise."""
    first = len(messages)
    while first and messages[first - 1].role == "tool":
        first -= 1
    if first in (0, len(messages)):
        return ()
    names = {call.id: call.function.name for call in messages[first - 1].tool_calls or ()}
    found = [names.get(message.tool_call_id) or message.name or "" for message in messages[first:]]
    known = dict.fromkeys(name for name in found if _TOOL_NAME.fullmatch(name))
    return tuple(known)[:MAX_TOOL_NAMES]
