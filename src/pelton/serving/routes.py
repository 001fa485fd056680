"""The table of routes: the router and the OpenAPI page are both made from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pelton.serving import sessions, status, timelines
from pelton.serving.context import ServingContext
from pelton.serving.openai import adapters, requests, responses, tokenization
from pelton.serving.openai.chat import create_chat_completion
from pelton.serving.openai.completions import create_completion

Handler = Callable[[ServingContext, Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    method: str
    path: str
    handler: Handler
    summary: str
    answer: type[msgspec.Struct] | None = None  # None: text
    body: type[msgspec.Struct] | None = None
    chunk: type[msgspec.Struct] | None = None  # of its stream
    errors: tuple[int, ...] = ()
    is_open: bool = False  # needs no key
    has_tenant: bool = False  # is answered for the tenant that asks


_BODY_ERRORS = (400, 401, 404, 408, 413, 415)
_GENERATION_ERRORS = (*_BODY_ERRORS, 429, 500, 503)

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
        method="GET",
        path="/v1/models",
        handler=status.list_models,
        summary="The served models",
        answer=responses.ModelList,
        errors=(401,),
    ),
    Route(
        method="GET",
        path="/v1/models/{model:path}",
        handler=status.show_model,
        summary="One served model",
        answer=responses.ModelInfo,
        errors=(401, 404),
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
        errors=(401,),
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
        errors=(401,),
    ),
)
