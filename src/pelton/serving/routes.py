"""The table of routes: the router and the OpenAPI page are both made from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pelton.serving import sessions, status, timelines
from pelton.serving.anthropic.errors import AnthropicError
from pelton.serving.anthropic.handlers import count_tokens, create_message
from pelton.serving.anthropic.objects import Message, MessageEvent, TokenCount
from pelton.serving.anthropic.requests import CountTokensRequest, MessageRequest
from pelton.serving.batches import batches, files
from pelton.serving.batches import objects as batch_objects
from pelton.serving.context import ServingContext
from pelton.serving.errors import ErrorResponse
from pelton.serving.openai import adapters, pooling_requests, requests, responses, tokenization
from pelton.serving.openai.chat import create_chat_completion
from pelton.serving.openai.completions import create_completion
from pelton.serving.openai.embeddings import create_embeddings
from pelton.serving.openai.responses_api import handlers, objects
from pelton.serving.openai.responses_api.requests import (
    InputItemsQuery,
    InputTokensRequest,
    ResponseRequest,
    RetrieveQuery,
)
from pelton.serving.scoring import create_ranking, create_score
from pelton.serving.tenants.admin_routes import ADMIN_ROUTES

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
    errors: tuple[int, ...] = ()
    error: type[msgspec.Struct] = ErrorResponse
    is_admin: bool = False  # needs a key of the scope `admin`, always
    is_open: bool = False  # needs no key
    has_tenant: bool = False  # is answered for the tenant that asks
    form: dict[str, Any] | None = None  # schema of a body that is a multipart form
    media_type: str = "text/plain"  # of an answer that is no JSON


_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
    },
}
_BODY_ERRORS = (400, 401, 403, 404, 408, 413, 415)
_GENERATION_ERRORS = (*_BODY_ERRORS, 429, 500, 503)

FILE_ROUTES = (
    Route(
        method="POST",
        path="/v1/files",
        handler=files.upload_file,
        summary="Upload the input of a batch",
        form=_UPLOAD,
        answer=batch_objects.FileObject,
        errors=(400, 401, 403, 408, 413, 415, 503),
        has_tenant=True,
    ),
    Route(
        method="GET",
        path="/v1/files",
        handler=files.list_files,
        summary="The tenant's files",
        query=batch_objects.FilesQuery,
        answer=batch_objects.FileList,
        errors=(400, 401, 403, 503),
        has_tenant=True,
    ),
    Route(
        method="GET",
        path="/v1/files/{file_id}",
        handler=files.show_file,
        summary="A file",
        answer=batch_objects.FileObject,
        errors=(400, 401, 403, 404, 503),
        has_tenant=True,
    ),
    Route(
        method="DELETE",
        path="/v1/files/{file_id}",
        handler=files.delete_file,
        summary="Delete a file",
        answer=batch_objects.DeletedFile,
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
        body=batch_objects.BatchRequest,
        answer=batch_objects.BatchObject,
        errors=(*_BODY_ERRORS, 429, 503),
        has_tenant=True,
    ),
    Route(
        method="GET",
        path="/v1/batches",
        handler=batches.list_batches,
        summary="The tenant's batches, the newest first",
        query=batch_objects.BatchesQuery,
        answer=batch_objects.BatchList,
        errors=(400, 401, 403, 503),
        has_tenant=True,
    ),
    Route(
        method="GET",
        path="/v1/batches/{batch_id}",
        handler=batches.show_batch,
        summary="A batch",
        answer=batch_objects.BatchObject,
        errors=(400, 401, 403, 404, 503),
        has_tenant=True,
    ),
    Route(
        method="POST",
        path="/v1/batches/{batch_id}/cancel",
        handler=batches.cancel_batch,
        summary="End a batch early",
        answer=batch_objects.BatchObject,
        errors=(400, 401, 403, 404, 409, 503),
        has_tenant=True,
    ),
)

ROUTES = (
    Route(
        method="POST",
        path="/v1/chat/completions",
        handler=create_chat_completion,
        summary="Answer a conversation",
        body=requests.ChatRequest,
        answer=responses.ChatCompletion,
        chunk=responses.ChatCompletionChunk,
        errors=_GENERATION_ERRORS,
        has_tenant=True,
    ),
    Route(
        method="POST",
        path="/v1/completions",
        handler=create_completion,
        summary="Continue prompts",
        body=requests.CompletionRequest,
        answer=responses.Completion,
        chunk=responses.Completion,
        errors=_GENERATION_ERRORS,
        has_tenant=True,
    ),
    Route(
        method="POST",
        path="/v1/responses",
        handler=handlers.create_response,
        summary="Answer items of a conversation, and keep the answer",
        body=ResponseRequest,
        answer=objects.ResponseObject,
        chunk=objects.ResponseEvent,
        errors=_GENERATION_ERRORS,
        has_tenant=True,
    ),
    Route(
        method="POST",
        path="/v1/responses/input_tokens",
        handler=handlers.count_input_tokens,
        summary="Count the tokens of a response's input",
        body=InputTokensRequest,
        answer=objects.InputTokenCount,
        errors=(*_BODY_ERRORS, 503),
        has_tenant=True,
    ),
    Route(
        method="GET",
        path="/v1/responses/{response_id}",
        handler=handlers.retrieve_response,
        summary="A stored response, or the events of one that runs in the background",
        query=RetrieveQuery,
        answer=objects.ResponseObject,
        chunk=objects.ResponseEvent,
        errors=(400, 401, 404, 503),
        has_tenant=True,
    ),
    Route(
        method="DELETE",
        path="/v1/responses/{response_id}",
        handler=handlers.delete_response,
        summary="Forget a stored response; one that runs is cancelled",
        answer=objects.DeletedResponse,
        errors=(400, 401, 404, 503),
        has_tenant=True,
    ),
    Route(
        method="POST",
        path="/v1/responses/{response_id}/cancel",
        handler=handlers.cancel_response,
        summary="Cancel a response that runs in the background",
        answer=objects.ResponseObject,
        errors=(400, 401, 404, 503),
        has_tenant=True,
    ),
    Route(
        method="GET",
        path="/v1/responses/{response_id}/input_items",
        handler=handlers.list_input_items,
        summary="The items that were sent with a stored response",
        query=InputItemsQuery,
        answer=objects.InputItemList,
        errors=(400, 401, 404, 503),
        has_tenant=True,
    ),
    Route(
        method="POST",
        path="/v1/messages",
        handler=create_message,
        summary="Answer a conversation, as Anthropic's API does",
        body=MessageRequest,
        answer=Message,
        chunk=MessageEvent,
        error=AnthropicError,
        errors=_GENERATION_ERRORS,
        has_tenant=True,
    ),
    Route(
        method="POST",
        path="/v1/messages/count_tokens",
        handler=count_tokens,
        summary="Count the tokens of a conversation",
        body=CountTokensRequest,
        answer=TokenCount,
        error=AnthropicError,
        errors=(*_BODY_ERRORS, 503),
        has_tenant=True,
    ),
    Route(
        method="POST",
        path="/v1/embeddings",
        handler=create_embeddings,
        summary="Vectors of texts",
        body=pooling_requests.EmbeddingRequest,
        answer=pooling_requests.EmbeddingList,
        errors=_GENERATION_ERRORS,
        has_tenant=True,
    ),
    *(
        Route(
            method="POST",
            path=path,
            handler=create_score,
            summary="How well texts go with each other",
            body=pooling_requests.ScoreRequest,
            answer=pooling_requests.ScoreList,
            errors=_GENERATION_ERRORS,
            has_tenant=True,
        )
        for path in ("/v1/score", "/score")
    ),
    *(
        Route(
            method="POST",
            path=path,
            handler=create_ranking,
            summary="Documents in the order of their relevance to a query",
            body=pooling_requests.RerankRequest,
            answer=pooling_requests.Ranking,
            errors=_GENERATION_ERRORS,
            has_tenant=True,
        )
        for path in ("/v1/rerank", "/v2/rerank", "/rerank")
    ),
    *FILE_ROUTES,
    Route(
        method="GET",
        path="/v1/models",
        handler=status.list_models,
        summary="The served models",
        answer=responses.ModelList,
        errors=(401, 403),
    ),
    Route(
        method="GET",
        path="/v1/models/{model:path}",
        handler=status.show_model,
        summary="One served model",
        answer=responses.ModelInfo,
        errors=(401, 403, 404),
    ),
    Route(
        method="POST",
        path="/v1/load_lora_adapter",
        handler=adapters.load_lora_adapter,
        summary="Load a LoRA adapter and give it a name",
        body=adapters.LoadAdapterRequest,
        errors=(*_BODY_ERRORS, 500, 503),
    ),
    Route(
        method="POST",
        path="/v1/unload_lora_adapter",
        handler=adapters.unload_lora_adapter,
        summary="Take an adapter's name back; requests that run with it go on",
        body=adapters.UnloadAdapterRequest,
        errors=(*_BODY_ERRORS, 500, 503),
    ),
    Route(
        method="POST",
        path="/tokenize",
        handler=tokenization.tokenize,
        summary="Token ids of a prompt or a conversation",
        body=requests.TokenizeRequest,
        answer=responses.TokenizeResponse,
        errors=(*_BODY_ERRORS, 503),
    ),
    Route(
        method="POST",
        path="/detokenize",
        handler=tokenization.detokenize,
        summary="Text of token ids",
        body=requests.DetokenizeRequest,
        answer=responses.DetokenizeResponse,
        errors=(*_BODY_ERRORS, 503),
    ),
    Route(
        method="GET",
        path="/v1/sessions",
        handler=sessions.list_sessions,
        summary="The tenant's sessions, the latest used first",
        answer=sessions.SessionList,
        errors=(400, 401, 503),
        has_tenant=True,
    ),
    Route(
        method="DELETE",
        path="/v1/sessions/{session_id:path}",
        handler=sessions.delete_session,
        summary="Forget a session and give up its KV",
        answer=sessions.DeletedSession,
        errors=(400, 401, 404, 503),
        has_tenant=True,
    ),
    Route(
        method="GET",
        path="/v1/requests/{request_id}/timeline",
        handler=sessions.show_timeline,
        summary="What happened to a request of the tenant",
        answer=timelines.RequestTimeline,
        errors=(400, 401, 404),
        has_tenant=True,
    ),
    Route(
        method="GET",
        path="/version",
        handler=status.show_version,
        summary="The server's version",
        answer=responses.VersionInfo,
        errors=(401, 403),
    ),
    Route(
        method="GET",
        path="/live",
        handler=status.live,
        summary="Whether the process is up",
        answer=responses.Status,
        is_open=True,
    ),
    Route(
        method="GET",
        path="/ready",
        handler=status.ready,
        summary="Whether requests are taken",
        answer=responses.Status,
        errors=(503,),
        is_open=True,
    ),
    Route(
        method="GET",
        path="/health",
        handler=status.ready,
        summary="The same as /ready",
        answer=responses.Status,
        errors=(503,),
        is_open=True,
    ),
    Route(
        method="GET",
        path="/metrics",
        handler=status.show_metrics,
        summary="Metrics for Prometheus",
        errors=(401, 403),
    ),
    *(Route(**row) for row in ADMIN_ROUTES),
)
