"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from pelton.core.errors import ContextLengthExceededError, InvalidRequestError
from pelton.core.sampling_params import SamplingParams
from pelton.serving.caller import caller_of
from pelton.serving.context import ServingContext, new_answer_id, now_unix_s
from pelton.serving.generation import PromptResult
from pelton.serving.openai.chunks import FINISH_REASONS, AnswerOptions, CompletionChunkEncoder, UsageCounter
from pelton.serving.openai.logprobs import CompletionLogprobsBuilder, prompt_logprobs
from pelton.serving.openai.parameters import best_sequences, truncated, usage_reports, without_bad_words
from pelton.serving.openai.requests import MAX_LISTED_TOKENS, CompletionRequest, check_supported
from pelton.serving.openai.responses import Completion, CompletionChoice
from pelton.serving.openai.sampling import completion_sampling
from pelton.serving.openai.structured_output import constrained
from pelton.serving.request_body import read_json_body
from pelton.serving.sse import CollectedAnswer, EventStream

MAX_PROMPTS = 256


async def create_completion(context: ServingContext, http_request: Request) -> Response:
    context.check_ready()
    request = await read_json_body(http_request, CompletionRequest, context.config.max_body_bytes)
    check_supported(request)
    context.check_model(request.model)
    caller = caller_of(http_request, request)
    sampling = await constrained(context, request, completion_sampling(request, context.defaults))
    sampling = await without_bad_words(context, request, sampling)
    prompts = [truncated(context, prompt, request, sampling) for prompt in await _token_ids(context, request)]
    options = _answer_options(context, request, sampling, prompts)
    generation = context.submit(options.answer_id, prompts, request, sampling, caller)
    if request.stream:
        return EventStream(generation, CompletionChunkEncoder(options))
    return CollectedAnswer(generation, sampling.n, _completion_builder(options, request.prompt_logprobs))


async def _token_ids(context: ServingContext, request: CompletionRequest) -> list[list[int]]:
    """Token ids of every prompt, tokenized one by one so that other requests get their turn."""
    most = context.max_model_len if request.truncate_prompt_tokens is None else MAX_LISTED_TOKENS
    _check_prompt_length(most, request.prompt)
    parts = prompt_parts(request.prompt, "prompt")

    def encode(text: str) -> list[int]:
        return context.encode(text, add_special_tokens=request.add_special_tokens, param="prompt")

    return [await context.prepare(encode, part) if isinstance(part, str) else part for part in parts]


def _check_prompt_length(most: int, prompt: str | Sequence[object]) -> None:
    """Before anything loops over it."""
    if isinstance(prompt, str) or not prompt:
        return
    if isinstance(prompt[0], int):
        if len(prompt) >= most:
            raise ContextLengthExceededError(
                f"the prompt has {len(prompt)} tokens, but the context holds {most} with at least one output token",
                param="prompt",
            )
    elif len(prompt) > MAX_PROMPTS:
        raise InvalidRequestError(f"{len(prompt)} prompts in one request; at most {MAX_PROMPTS}", param="prompt")


def prompt_parts(prompt: str | list[str | int | list[int]], param: str) -> Sequence[str | list[int]]:
    """A text, token ids, or a list of such."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequestError(f"{param} is empty", param=param)
    token_ids = [part for part in prompt if isinstance(part, int)]
    if len(token_ids) == len(prompt):
        return [token_ids]
    if token_ids:
        raise InvalidRequestError(
            f"{param} mixes token ids with texts or lists of them; send one list of token ids, or texts and lists",
            param=param,
        )
    return [part for part in prompt if not isinstance(part, int)]


def _answer_options(
    context: ServingContext, request: CompletionRequest, sampling: SamplingParams, prompts: list[list[int]]
) -> AnswerOptions:
    include_usage, continuous_usage = usage_reports(context, request)
    echo_texts = None
    if request.echo:
        parts = prompts if request.truncate_prompt_tokens is not None else prompt_parts(request.prompt, "prompt")
        echo_texts = [
            part if isinstance(part, str) else context.tokenizer.decode(part, skip_special_tokens=False)
            for part in parts
        ]
    return AnswerOptions(
        answer_id=new_answer_id("cmpl"),
        created=now_unix_s(),
        model=request.model or context.model.names[0],
        fingerprint=context.fingerprint(request.model),
        prompts=prompts,
        n=request.n or 1,
        spelling=context.spelling_of_ids if request.return_tokens_as_token_ids else context.spelling,
        logprobs=None if request.logprobs is None else sampling.num_top_logprobs,
        skip_special_tokens=sampling.skip_special_tokens,
        return_token_ids=bool(request.return_token_ids),
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        echo_texts=echo_texts,
        drop_output=request.max_tokens == 0,
    )


def _completion_builder(
    options: AnswerOptions, num_prompt_logprobs: int | None
) -> Callable[[list[PromptResult]], Completion]:
    def build(results: list[PromptResult]) -> Completion:
        usage = UsageCounter(options.num_prompt_tokens)
        choices = []
        for prompt_index, result in enumerate(results):
            for index, sequence in enumerate(result.sequences):
                if options.drop_output:
                    sequence.deltas, sequence.token_ids, sequence.logprobs = [], [], []
                usage.add(index, len(sequence.token_ids), sequence.usage)
            if len(result.sequences) > options.n:
                result.sequences = best_sequences(result.sequences, options.n)
            choices += [
                _choice(options, prompt_index, index, result, num_prompt_logprobs) for index in range(options.n)
            ]
        return Completion(
            id=options.answer_id,
            created=options.created,
            model=options.model,
            system_fingerprint=options.fingerprint,
            choices=choices,
            usage=usage.info(),
        )

    return build


def _choice(
    options: AnswerOptions, prompt_index: int, index: int, result: PromptResult, num_prompt_logprobs: int | None
) -> CompletionChoice:
    sequence = result.sequences[index]
    assert sequence.finish_reason is not None
    choice = CompletionChoice(
        index=prompt_index * options.n + index,
        text=sequence.text,
        finish_reason=FINISH_REASONS[sequence.finish_reason],
        stop_reason=sequence.stop_reason,
    )
    builder = None
    if options.logprobs is not None:
        builder = CompletionLogprobsBuilder(
            options.logprobs, options.spelling, skip_special_tokens=options.skip_special_tokens
        )
    prompt = options.prompts[prompt_index]
    if options.echo_texts is not None:
        choice.text = options.echo_texts[prompt_index] + sequence.text
        if builder is not None:
            choice.logprobs = builder.build_echo(prompt[0], result.prompt_logprobs, sequence.logprobs)
    elif builder is not None:
        choice.logprobs = builder.build(sequence.logprobs)
    choice.token_ids = sequence.token_ids if options.return_token_ids else UNSET
    choice.prompt_token_ids = prompt if options.return_token_ids else UNSET
    if num_prompt_logprobs is not None:
        choice.prompt_logprobs = prompt_logprobs(result.prompt_logprobs, num_prompt_logprobs, options.spelling)
    return choice
