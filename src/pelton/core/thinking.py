"""`ThinkingBudget`: how long a model may think before its answer is made to begin."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingBudget:
    """After `max_tokens` tokens of reasoning that has not ended, `forced_token_ids` are written, and the model goes on.

    Reasoning begins with `start_token_ids`, or with the answer where those are empty; it ends with `end_token_ids`,
    which is how `forced_token_ids` ends too.
    """

    max_tokens: int
    end_token_ids: tuple[int, ...]
    forced_token_ids: tuple[int, ...]
    start_token_ids: tuple[int, ...] = ()
