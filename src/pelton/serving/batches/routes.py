"""Files and batches in the table of routes."""

from __future__ import annotations

from pelton.serving.batches import batches, files, objects
from pelton.serving.route import BODY_ERRORS, Route

_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
    },
}

FILE_ROUTES = (
    Route(
        method="POST",
        path="/v1/files",
        handler=files.upload_file,
        summary="Upload the input of a batch",
        form=_UPLOAD,
        answer=objects.FileObject,
        errors=(400, 401, 403, 408, 413, 415, 503),
        has_tenant=True,
    ),
    Route(
        method="GET",
        path="/v1/files",
        handler=files.list_files,
        summary="The tenant's files",
        query=objects.FilesQuery,
        answer=objects.FileList,
        errors=(400, 401, 403, 503),
        has_tenant=True,
    ),
    Route(
        method="GET",
        path="/v1/files/{file_id}",
        handler=files.show_file,
        summary="A file",
        answer=objects.FileObject,
        errors=(400, 401, 403, 404, 503),
        has_tenant=True,
    ),
    Route(
        method="DELETE",
        path="/v1/files/{file_id}",
        handler=files.delete_file,
        summary="Delete a file",
        answer=objects.DeletedFile,
        errors=(400, 401, 403, 404, 409, 503),
        has_tenant=True,
    ),
    Route(
        method="GET",
        path="/v1/files/{file_id}/content",
        handler=files.show_content,
        summary="What is in a file",
        media_type="application/octet-stream",
        errors=(400, 401, 403, 404, 503),
        has_tenant=True,
    ),
    Route(
        method="POST",
        path="/v1/batches",
        handler=batches.create_batch,
        summary="Run the lines of a file when there is time",
        body=objects.BatchRequest,
        answer=objects.BatchObject,
        errors=(*BODY_ERRORS, 429, 503),
        has_tenant=True,
    ),
    Route(
        method="GET",
        path="/v1/batches",
        handler=batches.list_batches,
        summary="The tenant's batches, the newest first",
        query=objects.BatchesQuery,
        answer=objects.BatchList,
        errors=(400, 401, 403, 503),
        has_tenant=True,
    ),
    Route(
        method="GET",
        path="/v1/batches/{batch_id}",
        handler=batches.show_batch,
        summary="A batch",
        answer=objects.BatchObject,
        errors=(400, 401, 403, 404, 503),
        has_tenant=True,
    ),
    Route(
        method="POST",
        path="/v1/batches/{batch_id}/cancel",
        handler=batches.cancel_batch,
        summary="End a batch early",
        answer=objects.BatchObject,
        errors=(400, 401, 403, 404, 409, 503),
        has_tenant=True,
    ),
)
