"""`SamplingParams`: how the next token of a request is chosen, and when it stops."""

from __future__ import annotations

from dataclasses import dataclass, field

from pelton.core.errors import InvalidRequestError
from pelton.core.grammar import Grammar
from pelton.core.pooling import PoolingParams
from pelton.core.thinking import ThinkingBudget

MAX_LOGPROBS = 20
MAX_LOGPROB_TOKEN_IDS = 128
MAX_N = 128
MAX_STOP_STRINGS = 64
MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Immutable; validated on construction, so that a bad value never reaches the engine.

    Order of operations in the sampler: logit_bias, grammar and allowed/banned tokens, min_tokens, penalties,
    temperature, top_k, top_p, min_p. `temperature == 0` means greedy. Reported logprobs are those of
    the model (log-softmax of the raw logits), as OpenAI and vLLM report them.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    banned_token_ids: tuple[int, ...] = ()
    banned_sequences: tuple[tuple[int, ...], ...] = ()  # of the output; none may be completed
    max_tokens: int | None = None  # None: as many as the context holds
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None  # None: none; k: the sampled token's and the k most likely
    logprob_token_ids: tuple[int, ...] = ()  # logprobs of these, and the sampled one, instead of the most likely
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    shown_token_ids: tuple[int, ...] = ()  # special tokens that are in the text all the same
    thinking: ThinkingBudget | None = None
    grammar: Grammar | None = None
    pooling: PoolingParams | None = None  # instead of sampled tokens

    def __post_init__(self) -> None:
        _check_range("n", self.n, 1, MAX_N)
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_k", self.top_k, 0, 2**31 - 1)
        _check_range("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequestError("top_p must be greater than 0 and at most 1", param="top_p")
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) is greater than max_tokens ({self.max_tokens})", param="min_tokens"
            )
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(f"at most {MAX_STOP_STRINGS} stop strings are allowed", param="stop")
        if any(not text for text in self.stop):
            raise InvalidRequestError("a stop string must not be empty", param="stop")
        if self.seed is not None:
            _check_range("seed", self.seed, -(2**63), MAX_SEED)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_range(name, value, 0, MAX_LOGPROBS)
        if len(self.logprob_token_ids) > MAX_LOGPROB_TOKEN_IDS or (self.logprob_token_ids and self.logprobs is None):
            raise InvalidRequestError(
                f"logprob_token_ids needs logprobs and names at most {MAX_LOGPROB_TOKEN_IDS} tokens",
                param="logprob_token_ids",
            )
        for token_id, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise InvalidRequestError(
                    f"logit_bias of token {token_id} is {bias}; it must be between -100 and 100", param="logit_bias"
                )
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequestError("allowed_token_ids must name at least one token", param="allowed_token_ids")
        if self.pooling is not None and (self.n != 1 or self.max_tokens != 1):
            raise InvalidRequestError("a pooling request has n=1 and max_tokens=1", param="n")

    @property
    def num_top_logprobs(self) -> int | None:
        """How many of a token's alternatives are reported at most; None: no logprobs at all."""
        return len(self.logprob_token_ids) + 1 if self.logprob_token_ids else self.logprobs

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def edits_logits(self) -> bool:
        """Whether a bias, a ban or a penalty may change a token's logit."""
        return bool(
            self.logit_bias
            or self.allowed_token_ids is not None
            or self.banned_token_ids
            or self.min_tokens > 0
            or self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def takes_greatest(self) -> bool:
        """Whether the token of the greatest logit is all that is wanted of a step's logits."""
        return (
            self.is_greedy
            and not self.edits_logits
            and self.logprobs is None
            and not self.banned_sequences
            and self.grammar is None
            and self.thinking is None
        )


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise InvalidRequestError(f"{name} is {value}; it must be between {low} and {high}", param=name)
