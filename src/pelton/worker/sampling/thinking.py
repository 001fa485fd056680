"""Keeping a request to its `ThinkingBudget`: which token a step must sample, where it is not free to choose."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pelton.core.thinking import ThinkingBudget
from pelton.worker.sampling.sampler import TokenMask


class ThinkingLimit:
    """A function of the output tokens alone, so that a preempted request is held to the same tokens again."""

    def __init__(self, budget: ThinkingBudget) -> None:
        self._budget = budget
        self._is_open = not budget.start_token_ids
        self._is_over = False
        self._num_thought = 0
        self._num_forced = 0
        self._tail: tuple[int, ...] = ()
        self._max_tail = max(map(len, (budget.start_token_ids, budget.end_token_ids, budget.forced_token_ids)))

    def add_output(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if not self._is_over:
                self._add(token_id)

    def forced_token_id(self) -> int | None:
        """The token that comes next, whatever the logits say; None: any."""
        budget = self._budget
        if self._is_over or not self._is_open or self._num_thought < budget.max_tokens:
            return None
        return budget.forced_token_ids[self._num_forced]

    def _add(self, token_id: int) -> None:
        budget = self._budget
        is_forced = self.forced_token_id() == token_id
        self._tail = (*self._tail, token_id)[-self._max_tail :]
        if self._is_open:
            self._num_thought += 1
            self._num_forced += is_forced
            if self._num_thought == budget.max_tokens:  # it may have begun to end by itself
                self._num_forced = _overlap(self._tail, budget.forced_token_ids)
            is_forced_out = self._num_forced == len(budget.forced_token_ids)
            self._is_over = is_forced_out or _ends_with(self._tail, budget.end_token_ids)
        elif _ends_with(self._tail, budget.start_token_ids):
            self._is_open, self._tail = True, ()


def _ends_with(tail: tuple[int, ...], marker: tuple[int, ...]) -> bool:
    return tail[-len(marker) :] == marker


def _overlap(tail: tuple[int, ...], forced: tuple[int, ...]) -> int:
    """How many of `forced` the end of `tail` has already."""
    return max((size for size in range(1, len(forced)) if tail[-size:] == forced[:size]), default=0)


def only(token_id: int, vocab_size: int) -> TokenMask:
    """The mask that leaves one token."""
    mask = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
    mask[token_id // 32] = 1 << (token_id % 32)
    return mask
