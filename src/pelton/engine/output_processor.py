"""Sampled tokens to `RequestOutput`: text, stop conditions, finish reasons."""

from __future__ import annotations

from dataclasses import dataclass

from pelton.core.batch import StepResult
from pelton.core.errors import ErrorInfo
from pelton.core.output import RequestOutput, TokenLogprobs, Usage
from pelton.core.protocols import TokenDecoder
from pelton.core.request import FinishReason, Request
from pelton.engine.detokenizer import IncrementalDetokenizer, TokenTexts

_new = tuple.__new__  # a `NamedTuple` without the checks of its constructor
_NOTHING_MORE = (None,) * (len(RequestOutput._fields) - 4)


@dataclass(slots=True)
class _Generation:
    detokenizer: IncrementalDetokenizer
    stop_token_ids: frozenset[int]
    min_tokens: int
    max_tokens: int

    def is_usual(self, token_id: int, request: Request) -> bool:
        """Whether this token, the latest of `request`, can neither end it nor belong to a stop string."""
        return (
            len(request.output_token_ids) < self.max_tokens
            and not self.detokenizer.stop
            and token_id not in self.stop_token_ids
        )


class OutputProcessor:
    def __init__(self, decoder: TokenDecoder) -> None:
        self._decoder = decoder
        self._texts = TokenTexts(decoder)
        self._generations: dict[str, _Generation] = {}

    def add(self, request: Request) -> None:
        sampling = request.sampling
        eos_token_ids = frozenset[int]() if sampling.ignore_eos else self._decoder.eos_token_ids
        self._generations[request.request_id] = _Generation(
            IncrementalDetokenizer(
                self._texts,
                sampling.stop,
                skip_special_tokens=sampling.skip_special_tokens,
                shown_token_ids=sampling.shown_token_ids,
                include_stop_str_in_output=sampling.include_stop_str_in_output,
            ),
            eos_token_ids.union(sampling.stop_token_ids),
            sampling.min_tokens,
            request.max_num_tokens - request.num_prompt_tokens,
        )

    def remove(self, request: Request) -> None:
        self._generations.pop(request.request_id, None)

    def output(self, request: Request, token_ids: tuple[int, ...], result: StepResult, row: int) -> RequestOutput:
        """The delta for tokens that were just appended to `request`.

        Tokens after the one that ends the request are dropped, from the request too.
        """
        generation = self._generations[request.request_id]
        submission_id = request.parent_id or request.request_id
        if len(token_ids) == 1 and not result.logprobs and generation.is_usual(token_ids[0], request):
            text = generation.detokenizer.push(token_ids[0])
            return _new(RequestOutput, (submission_id, request.index, token_ids, text, *_NOTHING_MORE))
        first = len(request.output_token_ids) - len(token_ids)
        text = ""
        finish_reason: FinishReason | None = None
        stop_reason: int | str | None = None
        count = 0
        for token_id in token_ids:
            count += 1
            delta, finish_reason, stop_reason = self._push(request, generation, token_id, first + count)
            text += delta
            if count == len(token_ids) and request.request_id in result.complete_ids:
                if finish_reason is None:
                    text += generation.detokenizer.flush()
                if finish_reason in (None, FinishReason.LENGTH):
                    finish_reason = FinishReason.STOP
            if finish_reason is not None:
                del request.output_token_ids[first + count :]
                break
        logprobs = result.logprobs[row] if result.logprobs else None
        return RequestOutput(
            submission_id,
            request.index,
            token_ids[:count],
            text,
            finish_reason,
            stop_reason,
            logprobs[:count] if logprobs is not None else None,
            usage=usage_of(request) if finish_reason is not None else None,
        )

    def _push(
        self, request: Request, generation: _Generation, token_id: int, num_output_tokens: int
    ) -> tuple[str, FinishReason | None, int | str | None]:
        detokenizer = generation.detokenizer
        check_stop = num_output_tokens >= generation.min_tokens
        if check_stop and token_id in generation.stop_token_ids:
            keep = request.sampling.include_stop_str_in_output and token_id in request.sampling.stop_token_ids
            text = detokenizer.push(token_id, check_stop=False) if keep else ""
            return detokenizer.flush() + text, FinishReason.STOP, token_id
        text = detokenizer.push(token_id, check_stop=check_stop)
        if detokenizer.matched_stop is not None:
            return text, FinishReason.STOP, detokenizer.matched_stop
        if num_output_tokens >= generation.max_tokens:
            return text + detokenizer.flush(), FinishReason.LENGTH, None
        return text, None, None


def prompt_logprobs_output(request: Request, logprobs: tuple[TokenLogprobs, ...]) -> RequestOutput:
    return RequestOutput(request.parent_id or request.request_id, request.index, prompt_logprobs=logprobs)


def pooled_output(request: Request, pooled: bytes) -> RequestOutput:
    return RequestOutput(
        request.parent_id or request.request_id,
        request.index,
        finish_reason=FinishReason.STOP,
        usage=usage_of(request),
        pooled=pooled,
    )


def error_output(request: Request, error: ErrorInfo, reason: FinishReason = FinishReason.ERROR) -> RequestOutput:
    return RequestOutput(
        request.parent_id or request.request_id,
        request.index,
        finish_reason=reason,
        usage=usage_of(request),
        error=error,
    )


def usage_of(request: Request) -> Usage:
    return Usage(request.num_prompt_tokens, request.num_output_tokens, request.num_cached_tokens)
