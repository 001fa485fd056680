"""Files and batches as values. Imports no database."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct, field

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
UNFINISHED: tuple[BatchStatus, ...] = ("validating", "in_progress", "finalizing", "cancelling")


class FileRecord(Struct, kw_only=True, frozen=True):
    file_id: str
    tenant_id: str
    place: str  # the data directory that holds its content
    created_s: float
    expires_s: float | None
    filename: str
    purpose: str
    num_bytes: int


class BatchRecord(Struct, kw_only=True):
    """Changed by the runner that holds it; `times_s` has a moment for each status that it has reached."""

    batch_id: str
    tenant_id: str
    place: str
    created_s: float
    status: BatchStatus
    input_file_id: str
    endpoint: str
    completion_window: str
    expires_s: float
    output_file_id: str  # chosen when the batch is made, so that a second try writes the same files
    error_file_id: str
    key_id: str = ""  # of the API key that it runs on
    headers: dict[str, str] = field(default_factory=dict)  # that say who asks
    output_expires_after_s: float | None = None
    metadata: dict[str, str] | None = None
    num_total: int = 0
    num_completed: int = 0
    num_failed: int = 0
    times_s: dict[str, float] = field(default_factory=dict)
    problems: list[dict[str, Any]] = field(default_factory=list)
    has_output: bool = False
    has_errors: bool = False
