"""/v1/responses and what lies below it."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from pelton.core.errors import InvalidRequestError
from pelton.core.sampling_params import SamplingParams
from pelton.serving.built_answer import BuiltAnswer
from pelton.serving.caller import answered_tools, caller_of, tenant_of
from pelton.serving.context import ServingContext, new_answer_id, now_unix_s
from pelton.serving.conversation import PreparedTurn, constrain_turn, prepare_turn
from pelton.serving.errors import json_response
from pelton.serving.openai.chat import chat_conversation
from pelton.serving.openai.requests import ChatRequest, check_supported
from pelton.serving.openai.responses_api.builder import BuildOptions, ResponseBuilder
from pelton.serving.openai.responses_api.chat import chat_request
from pelton.serving.openai.responses_api.conversation import response_tools
from pelton.serving.openai.responses_api.items import input_items
from pelton.serving.openai.responses_api.listing import listed_items
from pelton.serving.openai.responses_api.objects import DeletedResponse, InputTokenCount, ResponseObject
from pelton.serving.openai.responses_api.requests import (
    InputItemsQuery,
    InputTokensRequest,
    ResponseRequest,
    RetrieveQuery,
    check_kinds,
)
from pelton.serving.openai.responses_api.runs import LogStream
from pelton.serving.openai.responses_api.service import decode_input
from pelton.serving.openai.responses_api.truncation import prepare_truncated
from pelton.serving.openai.sampling import chat_sampling
from pelton.serving.openai.structured_output import constrained
from pelton.serving.param_names import renamed_params
from pelton.serving.parsing.answer import AnswerPlan
from pelton.serving.query import read_query
from pelton.serving.request_body import read_json_body
from pelton.serving.sse import EventStream

# A chat's parameters, as they are called here.
PARAM_NAMES = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}


async def create_response(context: ServingContext, http_request: Request) -> Response:
    context.check_ready()
    request = await read_json_body(http_request, ResponseRequest, context.config.max_body_bytes, check_kinds)
    check_supported(request)
    context.check_model(request.model)
    stores = request.store is not False
    if request.background and not stores:
        raise InvalidRequestError("background=true needs store=true: nothing else keeps the answer", param="background")
    tenant_id = tenant_of(http_request)
    own = await context.responses.resolve(tenant_id, input_items(request.input))
    earlier = await context.responses.conversation(tenant_id, request.previous_response_id)
    chat = chat_request(request, earlier, own)
    caller = caller_of(http_request, chat)
    with renamed_params(PARAM_NAMES):
        sampling = await constrained(context, chat, chat_sampling(chat, context.defaults))
        turn = await _prepare(context, request, chat, sampling.max_tokens or 1)
        sampling = await constrain_turn(context, turn, sampling)
    response = _new_response(context, request, sampling)
    with renamed_params(PARAM_NAMES):
        generation = context.submit(
            response.id, [turn.token_ids], chat, sampling, caller, answered_tools(chat.messages)
        )
    builder = ResponseBuilder(
        response,
        BuildOptions(
            plan=turn.plan or AnswerPlan(),
            spelling=context.spelling,
            logprobs=sampling.logprobs,
            seals_reasoning="reasoning.encrypted_content" in (request.include or ()),
            emits=bool(request.stream),
        ),
    )
    if request.background:
        run = await context.responses.start_run(tenant_id, generation, builder, own, bool(request.stream))
        return LogStream(run.log, 0) if request.stream else json_response(response)

    async def save() -> None:
        builder.settle()
        if stores:
            await context.responses.save(tenant_id, response, own)

    if request.stream:
        return EventStream(generation, builder, before_last=save)
    return BuiltAnswer(generation, builder, lambda: builder.response, before_last=save)


async def _prepare(
    context: ServingContext, request: InputTokensRequest, chat: ChatRequest, num_reserved_tokens: int
) -> PreparedTurn:
    conversation = chat_conversation(context, chat)
    if request.truncation == "auto":
        return await context.prepare(prepare_truncated, context, conversation, num_reserved_tokens)
    return await context.prepare(prepare_turn, context, conversation)


def _new_response(context: ServingContext, request: ResponseRequest, sampling: SamplingParams) -> ResponseObject:
    """Says what was asked for, defaults filled in."""
    format = request.text.format if request.text is not None else None
    return ResponseObject(
        id=new_answer_id("resp").replace("-", "_"),
        created_at=now_unix_s(),
        model=request.model or context.model.names[0],
        status="queued" if request.background else "in_progress",
        output=[],
        instructions=request.instructions,
        previous_response_id=request.previous_response_id,
        background=bool(request.background),
        store=request.store is not False,
        max_output_tokens=request.max_output_tokens,
        max_tool_calls=request.max_tool_calls,
        metadata=request.metadata or {},
        parallel_tool_calls=request.parallel_tool_calls is not False,
        prompt_cache_key=request.prompt_cache_key,
        reasoning={"effort": request.reasoning.effort if request.reasoning is not None else None, "summary": None},
        safety_identifier=request.safety_identifier,
        temperature=sampling.temperature,
        text={"format": _plain(format) if format is not None else {"type": "text"}, "verbosity": "medium"},
        tool_choice=_plain(request.tool_choice) if request.tool_choice is not None else "auto",
        tools=[_TOOL_DEFAULTS | _plain(tool) for tool in response_tools(request.tools)],
        top_logprobs=request.top_logprobs or 0,
        top_p=sampling.top_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        truncation=request.truncation or "disabled",
        user=request.user,
    )


_TOOL_DEFAULTS = {"description": None, "parameters": None, "strict": None}


def _plain(value: Any) -> Any:
    """As JSON, without what was not sent."""
    value = msgspec.json.decode(msgspec.json.encode(value))  # tools in it are as they came
    return {name: inner for name, inner in value.items() if inner is not None} if isinstance(value, dict) else value


async def count_input_tokens(context: ServingContext, http_request: Request) -> Response:
    request = await read_json_body(http_request, InputTokensRequest, context.config.max_body_bytes, check_kinds)
    check_supported(request)
    context.check_model(request.model)
    tenant_id = tenant_of(http_request)
    own = await context.responses.resolve(tenant_id, input_items(request.input))
    earlier = await context.responses.conversation(tenant_id, request.previous_response_id)
    chat = chat_request(request, earlier, own)
    with renamed_params(PARAM_NAMES):
        turn = await _prepare(context, request, chat, 1)
    return json_response(InputTokenCount(input_tokens=len(turn.token_ids)))


async def retrieve_response(context: ServingContext, http_request: Request) -> Response:
    query = read_query(http_request, RetrieveQuery, unsupported=("include",))
    if query.include_obfuscation:
        raise InvalidRequestError(
            "include_obfuscation is not supported", param="include_obfuscation", code="unsupported_parameter"
        )
    if query.starting_after is not UNSET and not query.stream:
        raise InvalidRequestError("starting_after needs stream=true", param="starting_after")
    tenant_id, response_id = tenant_of(http_request), http_request.path_params["response_id"]
    if query.stream:
        log = await context.responses.events(tenant_id, response_id)
        return LogStream(log, 0 if query.starting_after is UNSET else query.starting_after + 1)
    return json_response(await context.responses.response(tenant_id, response_id))


async def list_input_items(context: ServingContext, http_request: Request) -> Response:
    """Those that were sent with this response, not those of the ones before it."""
    query = read_query(http_request, InputItemsQuery, unsupported=("include",))
    response_id = http_request.path_params["response_id"]
    record = await context.responses.find(tenant_of(http_request), response_id)
    after = None if query.after is UNSET else query.after
    items = listed_items(
        decode_input(record), response_id, limit=query.limit, after=after, descending=query.order == "desc"
    )
    return json_response(items)


async def cancel_response(context: ServingContext, http_request: Request) -> Response:
    response_id = http_request.path_params["response_id"]
    return json_response(await context.responses.cancel(tenant_of(http_request), response_id))


async def delete_response(context: ServingContext, http_request: Request) -> Response:
    """One that runs is cancelled first. What goes on from it cannot be gone on from any more."""
    response_id = http_request.path_params["response_id"]
    await context.responses.delete(tenant_of(http_request), response_id)
    return json_response(DeletedResponse(id=response_id))
