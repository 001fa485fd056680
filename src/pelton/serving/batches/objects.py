"""Bodies and answers of /v1/files and /v1/batches, in OpenAI's shapes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from pelton.serving.openai.requests import Metadata
from pelton.store.batch_records import BatchRecord, BatchStatus, FileRecord

MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 30 * 24 * 3600
FileId = Annotated[str, Meta(min_length=1, max_length=64)]


class FileObject(Struct, kw_only=True):
    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int | None = None
    object: Literal["file"] = "file"
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(Struct, kw_only=True):
    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: Literal["list"] = "list"


class FilesQuery(Struct, kw_only=True):
    """Of a page of files; `after` is the last of the page before."""

    after: Annotated[str, Meta(min_length=1, max_length=64)] | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    purpose: Annotated[str, Meta(max_length=32)] | UnsetType = UNSET


class BatchesQuery(Struct, kw_only=True):
    after: Annotated[str, Meta(min_length=1, max_length=64)] | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, le=100)] = 20


class DeletedFile(Struct, kw_only=True):
    id: str
    deleted: bool = True
    object: Literal["file"] = "file"


class ExpiresAfter(Struct, kw_only=True, forbid_unknown_fields=True):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=MIN_EXPIRY_S, le=MAX_EXPIRY_S)]


class BatchRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/batches."""

    input_file_id: FileId
    endpoint: Annotated[str, Meta(description="/v1/chat/completions, /v1/completions, /v1/embeddings, ...")]
    completion_window: Annotated[
        str, Meta(pattern=r"^[1-9][0-9]{0,5}[smhd]$", description="At most 30 days; what is unfinished then expires.")
    ]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchProblem(Struct, kw_only=True):
    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchProblems(Struct, kw_only=True):
    data: list[BatchProblem]
    object: Literal["list"] = "list"


class RequestCounts(Struct, kw_only=True):
    total: int
    completed: int
    failed: int


class BatchObject(Struct, kw_only=True):
    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    status: BatchStatus
    created_at: int
    expires_at: int
    request_counts: RequestCounts
    errors: BatchProblems | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    metadata: dict[str, str] | None = None
    object: Literal["batch"] = "batch"


class BatchList(Struct, kw_only=True):
    data: list[BatchObject]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: Literal["list"] = "list"


def file_object(record: FileRecord) -> FileObject:
    return FileObject(
        id=record.file_id,
        bytes=record.num_bytes,
        created_at=int(record.created_s),
        filename=record.filename,
        purpose=record.purpose,
        expires_at=None if record.expires_s is None else int(record.expires_s),
    )


def batch_object(record: BatchRecord) -> BatchObject:
    times: dict[str, Any] = {
        f"{status}_at": int(time_s) for status, time_s in record.times_s.items() if status != "validating"
    }
    problems = [BatchProblem(**problem) for problem in record.problems]
    return BatchObject(
        id=record.batch_id,
        endpoint=record.endpoint,
        input_file_id=record.input_file_id,
        completion_window=record.completion_window,
        status=record.status,
        created_at=int(record.created_s),
        expires_at=int(record.expires_s),
        request_counts=RequestCounts(total=record.num_total, completed=record.num_completed, failed=record.num_failed),
        errors=BatchProblems(data=problems) if problems else None,
        output_file_id=record.output_file_id if record.has_output else None,
        error_file_id=record.error_file_id if record.has_errors else None,
        metadata=record.metadata,
        **times,
    )
