"""Parameters that need more than to be passed on: `bad_words`, `truncate_prompt_tokens`, `best_of`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from msgspec import Struct

from pelton.core.errors import InvalidRequestError
from pelton.core.sampling_params import SamplingParams
from pelton.serving.context import ServingContext
from pelton.serving.generation import SequenceResult
from pelton.serving.openai.requests import GenerationRequest
from pelton.weights.tokenizer import Tokenizer


def check_belongs(request: Struct, names: tuple[str, ...], owner: str) -> None:
    """Raise for one of `names` that was sent, though `owner`, without which it says nothing, was not."""
    for name in names:
        if getattr(request, name):
            raise InvalidRequestError(f"{name} belongs to {owner}, which was not sent", param=name)


def truncated(
    context: ServingContext, prompt: list[int], request: GenerationRequest, sampling: SamplingParams
) -> list[int]:
    """What `truncate_prompt_tokens` keeps of `prompt`; -1: as many as leave room for the answer."""
    num_kept = request.truncate_prompt_tokens
    if num_kept is None:
        return prompt
    if num_kept < 0:
        num_kept = max(1, context.max_model_len - (sampling.max_tokens or 1))
    return cut(prompt, num_kept, request.truncation_side)


def cut(prompt: list[int], num_kept: int, side: Literal["left", "right"] | None) -> list[int]:
    """The last tokens, or the first where the right side is cut off."""
    return prompt[:num_kept] if side == "right" else prompt[max(0, len(prompt) - num_kept) :]


def usage_reports(context: ServingContext, request: GenerationRequest) -> tuple[bool, bool]:
    """Whether a stream ends with a chunk of usage, and whether each of its chunks reports it."""
    if context.config.enable_force_include_usage:
        return True, True
    options = request.stream_options
    return options is not None and bool(options.include_usage), options is not None and options.has_continuous_usage


async def without_bad_words(
    context: ServingContext, request: GenerationRequest, sampling: SamplingParams
) -> SamplingParams:
    """`sampling` with the token ids of `request.bad_words`."""
    if not request.bad_words:
        return sampling
    sequences = await context.prepare(bad_word_sequences, context.tokenizer, request.bad_words)
    return replace(sampling, banned_sequences=sequences)


def bad_word_sequences(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """How the words are written: at the start of a text, and after a space. Slow: runs in the pool."""
    texts = {text: None for word in words for text in (word, " " + word.lstrip())}
    found = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    return tuple(dict.fromkeys(token_ids for token_ids in found if token_ids))


def best_sequences(sequences: Sequence[SequenceResult], num_best: int) -> list[SequenceResult]:
    """Those of highest mean logprob, the best first; equal ones in order."""
    return sorted(sequences, key=_mean_logprob, reverse=True)[:num_best]


def _mean_logprob(sequence: SequenceResult) -> float:
    return sum(entry.logprob for entry in sequence.logprobs) / max(1, len(sequence.logprobs))
