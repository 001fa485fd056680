"""What operators and routers ask: models, version, probes, metrics."""

from __future__ import annotations

import contextlib

from starlette.requests import Request
from starlette.responses import Response

from pelton.core.errors import ServiceUnavailableError
from pelton.engine.client import EngineState
from pelton.serving.context import PELTON_VERSION, ServingContext
from pelton.serving.errors import json_response
from pelton.serving.openai.responses import ModelInfo, ModelList, Status, VersionInfo


async def list_models(context: ServingContext, _: Request) -> Response:
    names = (*context.model.names, *context.client.adapters)
    return json_response(ModelList(data=[_model_info(context, name) for name in names]))


async def show_model(context: ServingContext, request: Request) -> Response:
    name = request.path_params["model"]
    context.check_model(name)
    return json_response(_model_info(context, name))


def _model_info(context: ServingContext, name: str) -> ModelInfo:
    model = context.model
    info = ModelInfo(id=name, created=model.created, root=model.root, max_model_len=context.max_model_len)
    if name not in model.names:
        info.root, info.parent = context.client.adapters[name].path, model.names[0]
    return info


async def show_version(_context: ServingContext, _: Request) -> Response:
    return json_response(VersionInfo(version=PELTON_VERSION))


async def live(_context: ServingContext, _: Request) -> Response:
    """The process answers; says nothing of the engine."""
    return json_response(Status(status="live"))


async def ready(context: ServingContext, _: Request) -> Response:
    """Whether requests are taken."""
    context.check_ready()
    return json_response(Status(status="ready"))


async def show_metrics(context: ServingContext, _: Request) -> Response:
    if context.client.info is not None:
        context.metrics.set_info(context.client.info)
    if context.client.state is EngineState.READY:
        with contextlib.suppress(ServiceUnavailableError):  # the last known are shown
            context.metrics.tenancy.stats = await context.client.tenancy()
    else:
        context.metrics.clear_gauges()
    return Response(context.metrics.expose(), media_type="text/plain; version=0.0.4; charset=utf-8")
