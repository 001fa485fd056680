"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from pelton.core.errors import InvalidRequestError
from pelton.core.pooling import PoolingParams
from pelton.serving.context import ServingContext, new_answer_id, now_unix_s
from pelton.serving.openai.chat import chat_token_ids
from pelton.serving.openai.completions import prompt_parts
from pelton.serving.openai.parameters import check_belongs
from pelton.serving.openai.pooling_requests import MAX_INPUTS, Embedding, EmbeddingList, EmbeddingRequest
from pelton.serving.openai.requests import check_supported
from pelton.serving.pooling import ComputedAnswer, Pooling
from pelton.serving.request_body import read_json_body


async def create_embeddings(context: ServingContext, http_request: Request) -> Response:
    context.check_ready()
    request = await read_json_body(http_request, EmbeddingRequest, context.config.max_body_bytes)
    check_supported(request)
    context.check_model(request.model)
    parts, param = await _parts(context, request)
    answer_id = new_answer_id("embd")
    pooling = Pooling(context, request, http_request, answer_id)
    prompts = await pooling.tokenize(parts, param)
    params = PoolingParams(
        method=request.pooling or context.model.pooling, normalize=request.normalize, dimensions=request.dimensions
    )

    async def compute() -> EmbeddingList:
        pooled = await pooling.run(prompts, params)
        encode = as_base64 if request.encoding_format == "base64" else as_floats
        return EmbeddingList(
            id=answer_id,
            created=now_unix_s(),
            data=[Embedding(index=index, embedding=encode(values)) for index, values in enumerate(pooled.values)],
            model=request.model or context.model.names[0],
            usage=pooled.usage,
        )

    return ComputedAnswer(compute)


async def _parts(context: ServingContext, request: EmbeddingRequest) -> tuple[Sequence[str | list[int]], str]:
    """What vectors are wanted of, and the name of the parameter that says so."""
    if (request.input is None) == (request.messages is None):
        raise InvalidRequestError("send either input or messages", param="input", code="missing_required_parameter")
    if request.messages is not None:
        return [await context.prepare(chat_token_ids, context, request)], "messages"
    assert request.input is not None
    check_belongs(request, ("add_generation_prompt", "continue_final_message", "chat_template_kwargs"), "messages")
    parts = prompt_parts(request.input, "input")
    if len(parts) > MAX_INPUTS:
        raise InvalidRequestError(f"{len(parts)} inputs in one request; at most {MAX_INPUTS}", param="input")
    return parts, "input"


def as_base64(values: bytes) -> str:
    return base64.b64encode(values).decode()


def as_floats(values: bytes) -> list[float]:
    numbers = array("f", values)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
