"""What a client gets back, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pelton.core.errors import ErrorInfo
from pelton.core.request import FinishReason


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural, of the raw logits) at one position.

    `top` holds (token_id, logprob), most likely first; ties go to the lower id.
    """

    token_id: int
    logprob: float
    rank: int  # 1 = most likely
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0


class RequestOutput(NamedTuple):
    """A delta: what this step added to one sequence.

    `text` may lag behind `token_ids` while a character or a possible stop string is incomplete; the
    last output flushes what is left. `usage` comes with the last output of a sequence.
    """

    request_id: str  # the submission's
    index: int = 0  # type: ignore[assignment]  # which of n; hides tuple.index
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the token id or string that stopped it
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    usage: Usage | None = None
    error: ErrorInfo | None = None
    pooled: bytes | None = None  # float32, little-endian: the answer to `SamplingParams.pooling`
