"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from pelton.core.errors import InvalidRequestError
from pelton.core.sampling_params import SamplingParams
from pelton.serving.caller import answered_tools, caller_of
from pelton.serving.context import ServingContext, new_answer_id, now_unix_s
from pelton.serving.conversation import Conversation, PreparedTurn, constrain_turn, prepare_turn, render
from pelton.serving.generation import PromptResult, SequenceResult
from pelton.serving.openai.answers import finish_reason_name, response_message
from pelton.serving.openai.chunks import AnswerOptions, ChatChunkEncoder, UsageCounter
from pelton.serving.openai.logprobs import chat_logprobs, prompt_logprobs
from pelton.serving.openai.messages import template_messages
from pelton.serving.openai.parameters import truncated, usage_reports, without_bad_words
from pelton.serving.openai.pooling_requests import EmbeddingRequest
from pelton.serving.openai.requests import ChatRequest, check_supported
from pelton.serving.openai.responses import ChatChoice, ChatCompletion
from pelton.serving.openai.sampling import chat_sampling
from pelton.serving.openai.structured_output import constrained
from pelton.serving.openai.token_requests import TokenizeRequest
from pelton.serving.openai.tools import tool_use
from pelton.serving.parsing.answer import AnswerPlan, ParsedAnswer
from pelton.serving.reasoning.options import ReasoningOptions
from pelton.serving.request_body import read_json_body
from pelton.serving.sse import CollectedAnswer, EventStream, KeepingEncoder


async def create_chat_completion(context: ServingContext, http_request: Request) -> Response:
    context.check_ready()
    request = await read_json_body(http_request, ChatRequest, context.config.max_body_bytes)
    check_supported(request)
    context.check_model(request.model)
    caller = caller_of(http_request, request)
    conversation = chat_conversation(context, request)
    sampling = await constrained(context, request, chat_sampling(request, context.defaults))
    sampling = await without_bad_words(context, request, sampling)
    turn = await context.prepare(prepare_turn, context, conversation)
    turn = replace(turn, token_ids=truncated(context, turn.token_ids, request, sampling))
    sampling = await constrain_turn(context, turn, sampling)
    options = _answer_options(context, request, sampling, turn, is_named_tool=conversation.tool_use.is_named)
    tool_names = answered_tools(request.messages)
    generation = context.submit(options.answer_id, [turn.token_ids], request, sampling, caller, tool_names)
    build = _completion_builder(options, request.prompt_logprobs)
    if not request.store:
        if request.stream:
            return EventStream(generation, ChatChunkEncoder(options))
        return CollectedAnswer(generation, sampling.n, build)

    async def keep(answer: ChatCompletion) -> None:
        await context.archive.save(caller.tenant_id, answer, request.messages, request.metadata)

    if not request.stream:
        return CollectedAnswer(generation, sampling.n, build, keep=keep)
    encoder = KeepingEncoder(ChatChunkEncoder(options), sampling.n)
    return EventStream(generation, encoder, before_last=lambda: keep(build(encoder.results)))


def chat_token_ids(context: ServingContext, request: TokenizeRequest | EmbeddingRequest) -> list[int]:
    """Of a conversation that nobody answers. Slow: runs in the pool."""
    conversation = chat_conversation(context, request)
    return context.encode(
        render(context, conversation), add_special_tokens=conversation.add_special_tokens, param=conversation.param
    )


def chat_conversation(
    context: ServingContext, request: ChatRequest | TokenizeRequest | EmbeddingRequest
) -> Conversation:
    assert request.messages
    if request.continue_final_message and request.add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
        )
    add_generation_prompt = request.add_generation_prompt
    if add_generation_prompt is None:
        add_generation_prompt = not request.continue_final_message
    conversation = Conversation(
        messages=template_messages(request.messages),
        add_generation_prompt=add_generation_prompt,
        continue_final_message=request.continue_final_message,
        add_special_tokens=bool(request.add_special_tokens),
        variables=request.chat_template_kwargs,
    )
    if isinstance(request, EmbeddingRequest):
        return conversation
    if isinstance(request, TokenizeRequest):
        return replace(conversation, tool_use=tool_use(request.tools, None, is_parallel=True, enable_auto=True))
    use = tool_use(
        request.tools,
        request.tool_choice,
        is_parallel=request.parallel_tool_calls is not False,
        enable_auto=context.config.enable_auto_tool_choice,
    )
    return replace(conversation, tool_use=use, reasoning=_reasoning_options(request))


def _reasoning_options(request: ChatRequest) -> ReasoningOptions:
    names = ("thinking_token_budget", "thinking_budget", "max_thinking_tokens")
    sent = {name: value for name in names if (value := getattr(request, name)) is not None}
    if len(set(sent.values())) > 1:
        raise InvalidRequestError(f"{' and '.join(sent)} name the same limit: send one", param=next(iter(sent)))
    budget = next(iter(sent.values()), None)
    return ReasoningOptions(
        effort=request.reasoning_effort, budget=budget, is_shown=request.include_reasoning is not False
    )


def _answer_options(
    context: ServingContext,
    request: ChatRequest,
    sampling: SamplingParams,
    turn: PreparedTurn,
    *,
    is_named_tool: bool,
) -> AnswerOptions:
    include_usage, continuous_usage = usage_reports(context, request)
    last = request.messages[-1]
    echo_text = template_messages([last])[0]["content"] if request.echo and last.role == "assistant" else None
    return AnswerOptions(
        answer_id=new_answer_id("chatcmpl"),
        created=now_unix_s(),
        model=request.model or context.model.names[0],
        fingerprint=context.fingerprint(request.model),
        prompts=[turn.token_ids],
        n=sampling.n,
        spelling=context.spelling_of_ids if request.return_tokens_as_token_ids else context.spelling,
        logprobs=sampling.num_top_logprobs,
        skip_special_tokens=sampling.skip_special_tokens,
        return_token_ids=bool(request.return_token_ids),
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        echo_texts=[echo_text] if echo_text is not None else None,
        plan=turn.plan,
        reports_reasoning=turn.reports_reasoning,
        is_named_tool=is_named_tool,
    )


def _completion_builder(
    options: AnswerOptions, num_prompt_logprobs: int | None
) -> Callable[[list[PromptResult]], ChatCompletion]:
    def build(results: list[PromptResult]) -> ChatCompletion:
        (result,) = results
        usage = UsageCounter(options.num_prompt_tokens, reports_reasoning=options.reports_reasoning)
        choices = []
        for index, sequence in enumerate(result.sequences):
            usage.add(index, len(sequence.token_ids), sequence.usage)
            choices.append(_choice(options, index, sequence, usage))
        answer = ChatCompletion(
            id=options.answer_id,
            created=options.created,
            model=options.model,
            system_fingerprint=options.fingerprint,
            choices=choices,
            usage=usage.info(),
        )
        if num_prompt_logprobs is not None:
            answer.prompt_logprobs = prompt_logprobs(result.prompt_logprobs, num_prompt_logprobs, options.spelling)
        if options.return_token_ids:
            answer.prompt_token_ids = options.prompts[0]
        return answer

    return build


def _choice(options: AnswerOptions, index: int, sequence: SequenceResult, usage: UsageCounter) -> ChatChoice:
    assert sequence.finish_reason is not None
    echo_text = options.echo_texts[0] if options.echo_texts is not None else ""
    logprobs = None
    if options.logprobs is not None:
        logprobs = chat_logprobs(sequence.logprobs, options.logprobs, options.spelling)
    answer = _parse(options.plan, sequence, usage)
    return ChatChoice(
        index=index,
        message=response_message(answer, echo_text, reports_reasoning=options.reports_reasoning),
        finish_reason=finish_reason_name(
            sequence.finish_reason, len(answer.tool_calls), is_named=options.is_named_tool
        ),
        logprobs=logprobs,
        stop_reason=sequence.stop_reason,
        token_ids=sequence.token_ids if options.return_token_ids else UNSET,
    )


def _parse(plan: AnswerPlan | None, sequence: SequenceResult, usage: UsageCounter) -> ParsedAnswer:
    if plan is None:
        return ParsedAnswer(content=sequence.text)
    parser, answer = plan.make_parser(), ParsedAnswer()
    for text, token_ids in sequence.deltas:
        answer.add(parser.push(text, token_ids))
    answer.add(parser.finish())
    usage.num_reasoning_tokens += parser.num_reasoning_tokens
    return answer
