"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, in vLLM's shapes, for those who are let.

And DELETE /v1/models/{model}, in OpenAI's.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from pelton.core.errors import ConfigError, InvalidRequestError, PeltonError
from pelton.serving.context import ServingContext
from pelton.serving.errors import HTTPProblemError, json_response
from pelton.serving.logs import Logger
from pelton.serving.openai.requests import check_supported, neutral
from pelton.serving.openai.responses import DeletedModel
from pelton.serving.request_body import read_json_body

_log = Logger()
Name = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"^[\x21-\x7e]+$")]
# What may be wrong with the files, as opposed to the server: the client's to mend.
_FILE_ERRORS = ("invalid_model_file", "unsupported_model", ConfigError.code)


class LoadAdapterRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    lora_name: Annotated[Name, Meta(description="What clients send as `model`.")]
    lora_path: Annotated[
        str, Meta(min_length=1, max_length=4096, description="A folder of peft, or a .gguf file, of the server.")
    ]
    load_inplace: Annotated[bool, Meta(description="Take the name from the adapter that has it.")] = False
    base_model_name: Annotated[Any, neutral()] = None


class UnloadAdapterRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    lora_name: Name
    lora_int_id: Annotated[Any, neutral()] = None


async def load_lora_adapter(context: ServingContext, http_request: Request) -> Response:
    _check_allowed(context)
    request = await read_json_body(http_request, LoadAdapterRequest, context.config.max_body_bytes)
    check_supported(request)
    context.check_ready()
    name = request.lora_name
    if name in context.model.names:
        raise InvalidRequestError(f"{name!r} is the name of the model itself", param="lora_name")
    if "\0" in request.lora_path:
        raise InvalidRequestError("lora_path is no path", param="lora_path")
    try:
        adapter = await context.client.adapters.load(name, request.lora_path, replace=request.load_inplace)
    except PeltonError as error:
        if error.code in _FILE_ERRORS:
            raise InvalidRequestError(str(error), param="lora_path", code=error.code) from error
        raise
    _log.info("adapter loaded", name=name, path=adapter.path, rank=adapter.rank, num_bytes=adapter.num_bytes)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload_lora_adapter(context: ServingContext, http_request: Request) -> Response:
    _check_allowed(context)
    request = await read_json_body(http_request, UnloadAdapterRequest, context.config.max_body_bytes)
    check_supported(request)
    context.check_ready()
    await context.client.adapters.unload(request.lora_name)
    _log.info("adapter unloaded", name=request.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' removed successfully.")


async def delete_model(context: ServingContext, http_request: Request) -> Response:
    """OpenAI's way to give up a fine-tuned model: the adapter of that name is unloaded."""
    name = http_request.path_params["model"]
    context.check_model(name)
    if name in context.model.names:
        raise HTTPProblemError(
            403,
            f"{name!r} is the model that this server was started with; only adapters are deleted",
            code="not_allowed",
        )
    _check_allowed(context, 403)
    context.check_ready()
    await context.client.adapters.unload(name)
    _log.info("adapter unloaded", name=name)
    return json_response(DeletedModel(id=name))


def _check_allowed(context: ServingContext, status: int = 404) -> None:
    if not context.config.allow_runtime_lora_updating:
        raise HTTPProblemError(
            status,
            "adapters of this server are not changed while it runs: start it with --allow-runtime-lora-updating",
            code="not_enabled",
        )
