"""`StoredResponse`: what is kept of a response. Imports no database."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """`body` and `input` are JSON: the response as it was answered, and the items that were sent with it."""

    response_id: str
    tenant_id: str
    created_s: float
    body: bytes
    input: bytes
    previous_response_id: str | None = None
    is_running: bool = False
    server_id: str = ""  # where it runs
    lease_until_s: float = 0.0  # that server has died if this is over
    events: bytes | None = None  # compressed; of a background response that was made to be streamed
