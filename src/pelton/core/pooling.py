"""Pooling: what a request gets instead of sampled tokens, and which methods there are.

A method is a row here, for those who ask, and a class in `worker/pooling/`, for those who compute.
"""

from __future__ import annotations

from dataclasses import dataclass

from pelton.core.errors import InvalidRequestError

MAX_LABELS = 64


@dataclass(frozen=True, slots=True)
class PoolingMethod:
    text: str
    needs_all_tokens: bool  # so that tokens whose KV is cached are computed again


POOLING_METHODS = {
    "last": PoolingMethod("the last token's hidden state", False),
    "mean": PoolingMethod("the mean of the hidden states of all tokens", True),
    "cls": PoolingMethod("the first token's hidden state", True),
    "labels": PoolingMethod("the logits of some tokens after the last one", False),
}
# Those whose result is an embedding.
EMBEDDING_METHODS = ("last", "mean", "cls")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """Hidden states are those after the model's last norm. The result is cut to `dimensions`, then normalized."""

    method: str = "last"
    normalize: bool = True  # to length 1
    dimensions: int | None = None
    label_token_ids: tuple[int, ...] = ()  # of "labels"

    def __post_init__(self) -> None:
        if self.method not in POOLING_METHODS:
            raise InvalidRequestError(
                f"pooling is {self.method!r}; it may be {', '.join(POOLING_METHODS)}", param="pooling"
            )
        if self.dimensions is not None and self.dimensions < 1:
            raise InvalidRequestError(f"dimensions is {self.dimensions}; it must be at least 1", param="dimensions")
        if (self.method == "labels") != bool(self.label_token_ids) or len(self.label_token_ids) > MAX_LABELS:
            raise InvalidRequestError(f"labels wants 1 to {MAX_LABELS} token ids, other methods none", param="labels")

    @property
    def needs_all_tokens(self) -> bool:
        return POOLING_METHODS[self.method].needs_all_tokens
