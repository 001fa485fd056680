"""Request parameters to `SamplingParams`: the client's word first, then the model's defaults."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TypeVar

from pelton.core.errors import InvalidRequestError
from pelton.core.sampling_params import SamplingParams
from pelton.serving.openai.requests import TOKEN_ID_KEY, ChatRequest, CompletionRequest, GenerationRequest
from pelton.weights.tensors import GenerationDefaults

NumberT = TypeVar("NumberT", int, float)
DEFAULT_COMPLETION_TOKENS = 16  # of /v1/completions, as OpenAI documents it
MAX_SHOWN_KEYS = 5
MAX_SHOWN_CHARS = 40
_TOKEN_ID_KEY = re.compile(TOKEN_ID_KEY)


@dataclass(frozen=True, slots=True)
class _Lengths:
    max_tokens: int | None
    logprobs: int | None
    prompt_logprobs: int | None


def chat_sampling(request: ChatRequest, defaults: GenerationDefaults) -> SamplingParams:
    max_tokens = request.max_tokens
    if request.max_completion_tokens is not None:
        if max_tokens not in (None, request.max_completion_tokens):
            raise InvalidRequestError(
                f"max_tokens is {max_tokens} and max_completion_tokens {request.max_completion_tokens}; "
                "they name the same limit: send one",
                param="max_tokens",
            )
        max_tokens = request.max_completion_tokens
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs=true", param="top_logprobs")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return _sampling(request, defaults, _Lengths(max_tokens, logprobs, request.prompt_logprobs))


def completion_sampling(request: CompletionRequest, defaults: GenerationDefaults) -> SamplingParams:
    """`max_tokens` 0 is sampled as 1: the caller drops the token. It scores a prompt (echo, logprobs)."""
    max_tokens = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    if max_tokens == 0:
        if not request.echo:
            raise InvalidRequestError("max_tokens is 0; without echo it must be at least 1", param="max_tokens")
        max_tokens = 1
    logprobs = request.logprobs
    if _best_of(request) > (request.n or 1) and logprobs is None:
        logprobs = 0  # what the sequences are ranked by
    if request.logprob_token_ids is not None and (request.echo or request.logprobs is None):
        raise InvalidRequestError(
            "logprob_token_ids needs logprobs, and is of the answer alone: leave echo out", param="logprob_token_ids"
        )
    prompt_logprobs = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        prompt_logprobs = max(prompt_logprobs or 0, request.logprobs)
    sampling = _sampling(request, defaults, _Lengths(max_tokens, logprobs, prompt_logprobs))
    return replace(sampling, n=_best_of(request))


def _best_of(request: CompletionRequest) -> int:
    """How many sequences a prompt gets. Raises `InvalidRequestError` where fewer than are wanted, or a stream."""
    n = request.n or 1
    best_of = request.best_of or n
    if best_of < n:
        raise InvalidRequestError(f"best_of is {best_of} and n is {n}; best_of must be at least n", param="best_of")
    if best_of > n and request.stream:
        raise InvalidRequestError(
            f"best_of is {best_of} and n is {n}: which {n} are best is known at the end, so they cannot be streamed; "
            "send stream=false, or best_of equal to n",
            param="best_of",
        )
    return best_of


def _sampling(request: GenerationRequest, defaults: GenerationDefaults, lengths: _Lengths) -> SamplingParams:
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError("stream_options needs stream=true", param="stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise InvalidRequestError(
            "prompt_logprobs is not available with stream=true", param="prompt_logprobs", code="unsupported_parameter"
        )
    top_k = _first(request.top_k, defaults.top_k, 0)
    stop = request.stop or ()
    return SamplingParams(
        n=request.n or 1,
        temperature=_first(request.temperature, defaults.temperature, 1.0),
        top_k=max(top_k, 0),
        top_p=_first(request.top_p, defaults.top_p, 1.0),
        min_p=_first(request.min_p, defaults.min_p, 0.0),
        repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=_logit_bias(request.logit_bias or {}),
        allowed_token_ids=tuple(request.allowed_token_ids) if request.allowed_token_ids is not None else None,
        max_tokens=lengths.max_tokens,
        min_tokens=request.min_tokens or 0,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        include_stop_str_in_output=request.include_stop_str_in_output,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=request.ignore_eos,
        seed=request.seed,
        logprobs=lengths.logprobs,
        logprob_token_ids=tuple(request.logprob_token_ids or ()),
        prompt_logprobs=lengths.prompt_logprobs,
        skip_special_tokens=request.skip_special_tokens,
    )


def _logit_bias(sent: dict[str, float]) -> dict[int, float]:
    wrong = [token_id for token_id in sent if not _TOKEN_ID_KEY.fullmatch(token_id)]
    if wrong:
        shown = ", ".join(repr(token_id[:MAX_SHOWN_CHARS]) for token_id in wrong[:MAX_SHOWN_KEYS])
        more = f" and {len(wrong) - MAX_SHOWN_KEYS} more" if len(wrong) > MAX_SHOWN_KEYS else ""
        raise InvalidRequestError(
            f"logit_bias: {shown}{more}; its keys are token ids, in digits such as '42'", param="logit_bias"
        )
    return {int(token_id): bias for token_id, bias in sent.items()}


def _first(sent: NumberT | None, default: NumberT | None, fallback: NumberT) -> NumberT:
    if sent is not None:
        return sent
    return fallback if default is None else default
