"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from pelton.core.errors import InvalidRequestError
from pelton.core.sampling_params import SamplingParams
from pelton.serving.caller import answered_tools, caller_of
from pelton.serving.context import ServingContext, new_answer_id, now_unix_s
from pelton.serving.generation import PromptResult, SequenceResult
from pelton.serving.openai.chunks import FINISH_REASONS, AnswerOptions, ChatChunkEncoder, UsageCounter
from pelton.serving.openai.logprobs import chat_logprobs, prompt_logprobs
from pelton.serving.openai.messages import template_messages
from pelton.serving.openai.parameters import truncated, without_bad_words
from pelton.serving.openai.requests import ChatRequest, TokenizeRequest, check_supported
from pelton.serving.openai.responses import ChatChoice, ChatCompletion, ChatResponseMessage
from pelton.serving.openai.sampling import chat_sampling
from pelton.serving.openai.structured_output import constrained
from pelton.serving.request_body import read_json_body
from pelton.serving.sse import CollectedAnswer, EventStream


async def create_chat_completion(context: ServingContext, http_request: Request) -> Response:
    context.check_ready()
    request = await read_json_body(http_request, ChatRequest, context.config.max_body_bytes)
    check_supported(request)
    context.check_model(request.model)
    caller = caller_of(http_request, request)
    sampling = await constrained(context, request, chat_sampling(request, context.defaults))
    sampling = await without_bad_words(context, request, sampling)
    prompt = truncated(context, await context.prepare(chat_prompt, context, request), request, sampling)
    options = _answer_options(context, request, sampling, prompt)
    tool_names = answered_tools(request.messages)
    generation = context.submit(options.answer_id, [prompt], request, sampling, caller, tool_names)
    if request.stream:
        return EventStream(generation, ChatChunkEncoder(options))
    return CollectedAnswer(generation, sampling.n, _completion_builder(options, request.prompt_logprobs))


def chat_prompt(context: ServingContext, request: ChatRequest | TokenizeRequest) -> list[int]:
    """Token ids of the conversation. Slow: runs in the pool."""
    assert request.messages
    if context.template is None:
        raise InvalidRequestError(
            "this model has no chat template; use /v1/completions, or start the server with --chat-template",
            param="messages",
            code="no_chat_template",
        )
    if request.continue_final_message and request.add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
        )
    messages = template_messages(request.messages)
    add_generation_prompt = request.add_generation_prompt
    if add_generation_prompt is None:
        add_generation_prompt = not request.continue_final_message
    text = context.template.render(
        messages,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=request.continue_final_message,
        variables=request.chat_template_kwargs,
    )
    # The template writes BOS where the model wants one.
    return context.encode(text, add_special_tokens=bool(request.add_special_tokens), param="messages")


def _answer_options(
    context: ServingContext, request: ChatRequest, sampling: SamplingParams, prompt: list[int]
) -> AnswerOptions:
    stream_options = request.stream_options
    last = request.messages[-1]
    echo_text = template_messages([last])[0]["content"] if request.echo and last.role == "assistant" else None
    return AnswerOptions(
        answer_id=new_answer_id("chatcmpl"),
        created=now_unix_s(),
        model=request.model or context.model.names[0],
        prompts=[prompt],
        n=sampling.n,
        spelling=context.spelling_of_ids if request.return_tokens_as_token_ids else context.spelling,
        logprobs=sampling.logprobs,
        skip_special_tokens=sampling.skip_special_tokens,
        return_token_ids=bool(request.return_token_ids),
        include_usage=stream_options is not None and bool(stream_options.include_usage),
        continuous_usage=stream_options is not None and bool(stream_options.continuous_usage_stats),
        echo_texts=[echo_text] if echo_text is not None else None,
    )


def _completion_builder(
    options: AnswerOptions, num_prompt_logprobs: int | None
) -> Callable[[list[PromptResult]], ChatCompletion]:
    def build(results: list[PromptResult]) -> ChatCompletion:
        (result,) = results
        usage = UsageCounter(options.num_prompt_tokens)
        for index, sequence in enumerate(result.sequences):
            usage.add(index, len(sequence.token_ids), sequence.usage)
        answer = ChatCompletion(
            id=options.answer_id,
            created=options.created,
            model=options.model,
            choices=[_choice(options, index, sequence) for index, sequence in enumerate(result.sequences)],
            usage=usage.info(),
        )
        if num_prompt_logprobs is not None:
            answer.prompt_logprobs = prompt_logprobs(result.prompt_logprobs, num_prompt_logprobs, options.spelling)
        if options.return_token_ids:
            answer.prompt_token_ids = options.prompts[0]
        return answer

    return build


def _choice(options: AnswerOptions, index: int, sequence: SequenceResult) -> ChatChoice:
    assert sequence.finish_reason is not None
    echo_text = options.echo_texts[0] if options.echo_texts is not None else ""
    logprobs = None
    if options.logprobs is not None:
        logprobs = chat_logprobs(sequence.logprobs, options.logprobs, options.spelling)
    return ChatChoice(
        index=index,
        message=ChatResponseMessage(content=echo_text + sequence.text),
        finish_reason=FINISH_REASONS[sequence.finish_reason],
        logprobs=logprobs,
        stop_reason=sequence.stop_reason,
        token_ids=sequence.token_ids if options.return_token_ids else UNSET,
    )
