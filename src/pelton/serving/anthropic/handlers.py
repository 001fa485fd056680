"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from pelton.core.errors import InvalidRequestError
from pelton.core.sampling_params import SamplingParams
from pelton.serving.anthropic.builder import MessageBuilder, MessageOptions
from pelton.serving.anthropic.chat import asks_for_cache, chat_request
from pelton.serving.anthropic.objects import Message, MessageUsage, TokenCount
from pelton.serving.anthropic.requests import CountTokensRequest, MessageRequest, MessagesQuery, check_kinds
from pelton.serving.built_answer import BuiltAnswer
from pelton.serving.caller import answered_tools, caller_of, tenant_of
from pelton.serving.context import ServingContext, new_answer_id
from pelton.serving.conversation import PreparedTurn, constrain_turn, prepare_turn
from pelton.serving.errors import json_response
from pelton.serving.openai.chat import chat_conversation
from pelton.serving.openai.requests import ChatRequest, check_supported
from pelton.serving.openai.sampling import chat_sampling
from pelton.serving.openai.structured_output import constrained
from pelton.serving.param_names import renamed_params
from pelton.serving.parsing.answer import AnswerPlan
from pelton.serving.query import read_query
from pelton.serving.request_body import read_json_body
from pelton.serving.sse import EventStream

_VERSION = re.compile(r"\d{4}-\d{2}-\d{2}")
OLDEST_VERSION = "2023-06-01"
# A chat's parameters, as they are called here.
PARAM_NAMES = {
    "reasoning_effort": "output_config.effort",
    "thinking_budget": "thinking",
    "response_format": "output_config.format",
    "prompt": "messages",
}


async def create_message(context: ServingContext, http_request: Request) -> Response:
    context.check_ready()
    request = await read_json_body(http_request, MessageRequest, context.config.max_body_bytes, check_kinds)
    _check(context, http_request, request)
    chat = chat_request(request)
    caller = caller_of(http_request, chat)
    with renamed_params(PARAM_NAMES):
        turn = await _prepare(context, chat)
        sampling = await constrained(context, chat, chat_sampling(chat, context.defaults))
        sampling = await constrain_turn(context, turn, sampling)
    prompt = turn.token_ids
    sampling, is_limited = _within_context(sampling, len(prompt), context.max_model_len)
    answer_id = new_answer_id("msg").replace("-", "_")
    generation = context.submit(answer_id, [prompt], chat, sampling, caller, answered_tools(chat.messages))
    options = MessageOptions(
        plan=turn.plan or AnswerPlan(),
        num_prompt_tokens=len(prompt),
        stop_sequences=tuple(request.stop_sequences or ()),
        num_cacheable_tokens=_num_cacheable(context, len(prompt)) if asks_for_cache(request) else 0,
        is_context_limited=is_limited,
        emits=bool(request.stream),
    )
    message = Message(
        id=answer_id,
        model=request.model or context.model.names[0],
        content=[],
        usage=MessageUsage(
            input_tokens=len(prompt), cache_creation_input_tokens=0, cache_read_input_tokens=0, output_tokens=0
        ),
    )
    builder = MessageBuilder(message, options, _cached_tokens(context, caller.tenant_id, answer_id))
    if request.stream:
        return EventStream(generation, builder)
    return BuiltAnswer(generation, builder, lambda: builder.message)


async def count_tokens(context: ServingContext, http_request: Request) -> Response:
    request = await read_json_body(http_request, CountTokensRequest, context.config.max_body_bytes, check_kinds)
    _check(context, http_request, request)
    chat = chat_request(request)
    with renamed_params(PARAM_NAMES):
        turn = await _prepare(context, chat)
    return json_response(TokenCount(input_tokens=len(turn.token_ids)))


async def _prepare(context: ServingContext, chat: ChatRequest) -> PreparedTurn:
    if context.dialect.reasoning_format is None:
        # What a model that does not think may think at most is nothing that it could exceed.
        chat.thinking_token_budget = None
    return await context.prepare(prepare_turn, context, chat_conversation(context, chat))


def _check(context: ServingContext, http_request: Request, request: CountTokensRequest) -> None:
    version = http_request.headers.get("anthropic-version", OLDEST_VERSION)
    if not _VERSION.fullmatch(version) or version < OLDEST_VERSION:
        raise InvalidRequestError(
            f"anthropic-version is {version[:64]!r}; it must be {OLDEST_VERSION} or later", param="anthropic-version"
        )
    read_query(http_request, MessagesQuery)
    tenant_of(http_request)
    check_supported(request)
    context.check_model(request.model)


def _within_context(
    sampling: SamplingParams, num_prompt_tokens: int, max_model_len: int
) -> tuple[SamplingParams, bool]:
    """Anthropic's max_tokens is a bound, not a reservation: agents send 32,000 to any model."""
    room = max(1, max_model_len - num_prompt_tokens)
    if sampling.max_tokens is None or sampling.max_tokens <= room:
        return sampling, False
    return replace(sampling, max_tokens=room), True


def _num_cacheable(context: ServingContext, num_prompt_tokens: int) -> int:
    """Of a prompt, its full blocks are kept."""
    assert context.client.info is not None
    block_size = context.client.info.block_size
    return num_prompt_tokens // block_size * block_size


def _cached_tokens(context: ServingContext, tenant_id: str, answer_id: str) -> Callable[[], int]:
    """How many of the prompt's tokens were found in the cache, known once the request was scheduled."""

    def find() -> int:
        timeline = context.timelines.find(tenant_id, answer_id)
        events = timeline.events if timeline is not None else []
        return next((event.num_tokens for event in events if event.kind == "scheduled"), 0)

    return find
