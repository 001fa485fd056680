"""`create_app`: the ASGI application over an `EngineClient`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from pelton.core.errors import PeltonError
from pelton.engine.client import EngineClient
from pelton.serving.chat_template import ChatTemplateError
from pelton.serving.config import ServerConfig
from pelton.serving.context import NUM_PREPARE_THREADS, ModelCard, ServingContext
from pelton.serving.errors import HTTPProblemError, error_response
from pelton.serving.metrics import ServerMetrics
from pelton.serving.middleware import RequestMiddleware
from pelton.serving.openai.logprobs import TokenSpelling
from pelton.serving.openapi import build_openapi
from pelton.serving.routes import ROUTES, Handler
from pelton.serving.status import PELTON_VERSION
from pelton.serving.template_process import TemplateRenderer
from pelton.weights.tensors import GenerationDefaults
from pelton.weights.tokenizer import Tokenizer

_log = structlog.get_logger("pelton.serving")


def create_app(
    client: EngineClient,
    tokenizer: Tokenizer,
    model: ModelCard,
    config: ServerConfig,
    *,
    chat_template: str | None = None,
    generation_defaults: GenerationDefaults | None = None,
) -> FastAPI:
    """The application. It neither starts nor closes `client`; until that is ready, it answers 503.

    `chat_template` is a template's source; without one, chat is refused with a reason.
    """
    metrics = ServerMetrics(model.names[0])
    client.add_listener(metrics.take_update)
    context = ServingContext(
        client=client,
        tokenizer=tokenizer,
        model=model,
        config=config,
        template=_template_renderer(chat_template, tokenizer),
        defaults=generation_defaults or GenerationDefaults(),
        metrics=metrics,
        spelling=TokenSpelling(tokenizer),
        pool=ThreadPoolExecutor(NUM_PREPARE_THREADS, "pelton-prepare"),
    )
    app = FastAPI(
        title="Pelton",
        version=PELTON_VERSION,
        lifespan=_lifespan(context),
        redirect_slashes=False,
        exception_handlers={PeltonError: _handle_typed(context), HTTPException: _handle_http},
    )
    for route in ROUTES:
        endpoint = _endpoint(context, route.handler)
        app.add_api_route(route.path, endpoint, methods=[route.method], response_model=None)
    document = build_openapi(ROUTES, PELTON_VERSION, has_key=config.api_key is not None)
    app.openapi = lambda: document  # type: ignore[method-assign]
    app.add_middleware(RequestMiddleware, api_key=config.api_key, metrics=metrics)
    if config.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"])
    return app


def _template_renderer(source: str | None, tokenizer: Tokenizer) -> TemplateRenderer | None:
    if source is None:
        return None
    names = ("bos_token", "eos_token", "pad_token")
    return TemplateRenderer(source, {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name)})


def _lifespan(context: ServingContext) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        _log.info("generation defaults", **_known_defaults(context.defaults))
        if context.template is not None:
            # A helper process ahead of the first chat; nobody waits for it here.
            context.pool.submit(_start_template, context.template)
        try:
            yield
        finally:
            context.pool.shutdown(wait=False, cancel_futures=True)
            if context.template is not None:
                context.template.close()

    return lifespan


def _known_defaults(defaults: GenerationDefaults) -> dict[str, float]:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: getattr(defaults, name) for name in names if getattr(defaults, name) is not None}


def _start_template(template: TemplateRenderer) -> None:
    try:
        template.start()
    except ChatTemplateError as error:
        _log.warning("the chat template is not usable", problem=str(error))


def _endpoint(context: ServingContext, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await handler(context, request)

    return endpoint


def _handle_typed(context: ServingContext) -> Callable[[Request, Exception], Coroutine[Any, Any, Response]]:
    async def handle(request: Request, error: Exception) -> Response:
        assert isinstance(error, PeltonError)
        if request.method == "POST":
            context.metrics.count_rejection(error.code)
        return error_response(error)

    return handle


async def _handle_http(request: Request, error: Exception) -> Response:
    """404 and 405 of the router, in the common shape."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:256]
    if error.status_code == 405:
        problem, code = f"{request.method} is not allowed on {path}", "method_not_allowed"
    elif error.status_code == 404:
        problem, code = f"there is no {path} here", "not_found"
    else:
        problem, code = str(error.detail), "invalid_request"
    return error_response(HTTPProblemError(error.status_code, problem, code=code, headers=dict(error.headers or {})))
