"""`StoredCompletion`: what is kept of a chat completion. Imports no database."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCompletion:
    """`body` and `messages` are JSON: the answer, and the messages that were sent for it."""

    completion_id: str
    tenant_id: str
    created_s: float
    model: str
    labels: str  # a word for each pair of its metadata, with a space on either side
    body: bytes
    messages: bytes
