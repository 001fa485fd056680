"""`create_app`: the ASGI application over an `EngineClient`."""

from __future__ import annotations

import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import Scope

from pelton.core.errors import PeltonError
from pelton.engine.client import EngineClient
from pelton.serving.anthropic.errors import error_answer
from pelton.serving.batches.file_store import FileStore
from pelton.serving.batches.runner import BatchRunner
from pelton.serving.config import ServerConfig
from pelton.serving.context import NUM_PREPARE_THREADS, PELTON_VERSION, ModelCard, ServingContext
from pelton.serving.dialect import Dialect
from pelton.serving.errors import HTTPProblemError
from pelton.serving.logs import Logger
from pelton.serving.lora_metrics import LoraMetrics
from pelton.serving.metrics import ServerMetrics
from pelton.serving.middleware import RequestMiddleware
from pelton.serving.openai.logprobs import TokenIdSpelling, TokenSpelling
from pelton.serving.openai.responses_api.service import ResponseService
from pelton.serving.openai.stored_chat.archive import CompletionArchive
from pelton.serving.query import NoQuery, read_query
from pelton.serving.route import Route as ServedRoute
from pelton.serving.routes import ROUTES
from pelton.serving.scoring import check_score_tokens
from pelton.serving.template_error import ChatTemplateError
from pelton.serving.template_process import TemplateRenderer
from pelton.serving.tenants.access import AccessControl
from pelton.serving.tenants.service import TenantService
from pelton.serving.timelines import Timelines
from pelton.store.opener import Store
from pelton.weights.tensors import GenerationDefaults
from pelton.weights.tokenizer import Tokenizer

_log = Logger()


def create_app(
    client: EngineClient,
    tokenizer: Tokenizer,
    model: ModelCard,
    config: ServerConfig,
    *,
    chat_template: str | None = None,
    generation_defaults: GenerationDefaults | None = None,
    store: Store | None = None,
) -> Starlette:
    """The application. It neither starts nor closes `client`; until that is ready, it answers 503.

    `chat_template` is a template's source; without one, chat is refused with a reason.
    """
    check_score_tokens(config, tokenizer)
    metrics = ServerMetrics(model.names[0])
    store = store or Store()
    tenants = TenantService(client, store, api_key=config.api_key, admin_key=config.admin_api_key)
    timelines = Timelines()
    client.add_listener(metrics.take_update)
    client.add_listener(timelines.take_update)
    lora_metrics = LoraMetrics(client, metrics.labels)
    metrics.registry.register(lora_metrics)
    client.add_listener(lora_metrics.take_update)
    context = ServingContext(
        client=client,
        tokenizer=tokenizer,
        model=model,
        config=config,
        template=_template_renderer(chat_template, tokenizer),
        dialect=Dialect(
            tokenizer,
            chat_template,
            " ".join((*model.names, model.root)),
            tool_call_parser=config.tool_call_parser,
            reasoning_parser=config.reasoning_parser,
        ),
        defaults=generation_defaults or GenerationDefaults(),
        metrics=metrics,
        lora_metrics=lora_metrics,
        timelines=timelines,
        spelling=TokenSpelling(tokenizer),
        spelling_of_ids=TokenIdSpelling(tokenizer),
        pool=ThreadPoolExecutor(NUM_PREPARE_THREADS, "pelton-prepare"),
        store=store,
        responses=_response_service(store, config),
        archive=_completion_archive(store, config),
        tenants=tenants,
    )
    context.batches = BatchRunner(context, FileStore(context.store.config.data_path))
    routes = [_Route(route.path, _endpoint(context, route), methods=[route.method]) for route in ROUTES]
    routes += [
        _Route("/openapi.json", _show_openapi(tenants.access, config.root_path), methods=["GET"]),
        _Route("/docs", _show_docs(config.root_path), methods=["GET"]),
    ]
    app = Starlette(
        routes=routes,
        middleware=_middleware(config, metrics, tenants.access),
        lifespan=_lifespan(context),
        exception_handlers={PeltonError: _handle_typed(context), HTTPException: _handle_http},
    )
    app.router.redirect_slashes = False
    return app


def _response_service(store: Store, config: ServerConfig) -> ResponseService:
    place = f"{socket.gethostname()}:{config.host}:{config.port}" if config.port else uuid.uuid4().hex
    return ResponseService(
        store,
        retention_s=config.response_retention_days * 86400.0,
        max_per_tenant=config.max_stored_responses,
        server_id=place,
    )


def _completion_archive(store: Store, config: ServerConfig) -> CompletionArchive:
    retention_s = config.response_retention_days * 86400.0
    return CompletionArchive(store, retention_s=retention_s, max_per_tenant=config.max_stored_responses)


class _Route(Route):
    """Tells the middleware which route was taken; answers to its methods only, not to HEAD beside GET."""

    def __init__(self, path: str, endpoint: Callable[[Request], Awaitable[Response]], methods: Sequence[str]) -> None:
        super().__init__(path, endpoint, methods=methods)
        self.methods = set(methods)

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, found = super().matches(scope)
        if match is not Match.NONE:
            found["route"] = self
        return match, found


def _middleware(config: ServerConfig, metrics: ServerMetrics, access: AccessControl) -> list[Middleware]:
    """The outermost first."""
    found = [Middleware(RequestMiddleware, access=access, metrics=metrics, root_path=config.root_path)]
    if config.cors_origins:
        from starlette.middleware.cors import CORSMiddleware

        cors = Middleware(CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"])
        found.insert(0, cors)
    return found


def _show_openapi(access: AccessControl, root_path: str) -> Callable[[Request], Awaitable[Response]]:
    @cache
    def document(has_key: bool) -> dict[str, Any]:
        from pelton.serving.openapi import build_openapi

        found = build_openapi(ROUTES, PELTON_VERSION, has_key=has_key)
        return found | {"servers": [{"url": root_path}]} if root_path else found

    async def show(_: Request) -> Response:
        return JSONResponse(document(access.needs_key))

    return show


def _show_docs(root_path: str) -> Callable[[Request], Awaitable[Response]]:
    async def show(_: Request) -> Response:
        # For this page alone: the rest needs no more of FastAPI than the router below it.
        from fastapi.openapi.docs import get_swagger_ui_html

        return get_swagger_ui_html(openapi_url=f"{root_path}/openapi.json", title="Pelton")

    return show


def _template_renderer(source: str | None, tokenizer: Tokenizer) -> TemplateRenderer | None:
    if source is None:
        return None
    names = ("bos_token", "eos_token", "pad_token")
    return TemplateRenderer(source, {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name)})


def _lifespan(context: ServingContext) -> Callable[[Starlette], Any]:
    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await context.tenants.start()
        _log.info("generation defaults", **_known_defaults(context.defaults))
        if context.template is not None:
            # A helper process ahead of the first chat; nobody waits for it here.
            context.pool.submit(_start_template, context.template)
        context.batches.start_if_used()
        try:
            yield
        finally:
            await context.responses.close()
            await context.batches.close()
            context.pool.shutdown(wait=False, cancel_futures=True)
            await context.tenants.close()
            if context.template is not None:
                context.template.close()
            if context.grammars is not None:
                context.grammars.close()

    return lifespan


def _known_defaults(defaults: GenerationDefaults) -> dict[str, float]:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: getattr(defaults, name) for name in names if getattr(defaults, name) is not None}


def _start_template(template: TemplateRenderer) -> None:
    try:
        template.start()
    except ChatTemplateError as error:
        _log.warning("the chat template is not usable", problem=str(error))


def _endpoint(context: ServingContext, route: ServedRoute) -> Callable[[Request], Awaitable[Response]]:
    takes_any_query = route.query is not None or route.is_open  # which it reads itself; probes are asked by anything

    async def endpoint(request: Request) -> Response:
        if request.scope["query_string"] and not takes_any_query:
            read_query(request, NoQuery)
        return await route.handler(context, request)

    return endpoint


def _handle_typed(context: ServingContext) -> Callable[[Request, Exception], Coroutine[Any, Any, Response]]:
    async def handle(request: Request, error: Exception) -> Response:
        assert isinstance(error, PeltonError)
        if request.method == "POST":
            context.metrics.count_rejection(error.code)
        return error_answer(request.scope, error)

    return handle


async def _handle_http(request: Request, error: Exception) -> Response:
    """404 and 405 of the router, in the common shape."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:256]
    if error.status_code == 405:
        problem, code = f"{request.method} is not allowed on {path}", "method_not_allowed"
    elif error.status_code == 404:
        problem, code = f"there is no {path} here", "not_found"
        if f"/v1{path}" in {route.path for route in ROUTES}:
            problem += f"; it is at /v1{path}: the base URL of a client ends with /v1"
    else:
        problem, code = str(error.detail), "invalid_request"
    answer = HTTPProblemError(error.status_code, problem, code=code, headers=dict(error.headers or {}))
    return error_answer(request.scope, answer)
