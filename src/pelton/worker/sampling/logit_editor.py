"""Changes to one request's logits before a token is chosen: bias, masks, min_tokens, penalties.

Legend: V vocabulary, N distinct tokens seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from pelton.core.sampling_params import SamplingParams
from pelton.worker.sampling.selection import Row, TokenIds

_BANNED = np.float32(-np.inf)


class LogitEditor:
    """Holds what the edits of one request need, in the order `SamplingParams` documents.

    Ids outside the vocabulary are ignored: they can be neither likelier nor banned.
    """

    def __init__(self, sampling: SamplingParams, eos_token_ids: Iterable[int], vocab_size: int) -> None:
        self._sampling = sampling
        bias = {i: value for i, value in sampling.logit_bias.items() if 0 <= i < vocab_size}
        self._bias_ids = _ids(bias, vocab_size)
        self._bias = np.array(list(bias.values()), dtype=np.float32)
        allowed = sampling.allowed_token_ids
        self._allowed_ids = None if allowed is None else _ids(allowed, vocab_size)
        self._banned_ids = _ids(sampling.banned_token_ids, vocab_size)
        stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(eos_token_ids))
        self._stop_ids = _ids(sorted(stops), vocab_size)
        has_penalty = sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        self._seen = _SeenTokens() if has_penalty or sampling.repetition_penalty != 1.0 else None

    def add_prompt(self, token_ids: Sequence[int]) -> None:
        if self._seen is not None and self._sampling.repetition_penalty != 1.0:
            self._seen.add(token_ids, 0)

    def add_output(self, token_ids: Sequence[int]) -> None:
        if self._seen is not None:
            self._seen.add(token_ids, 1)

    def apply(self, row: Row, num_output_tokens: int) -> None:
        """Edit `row` [V] in place; a banned token becomes -inf."""
        row[self._bias_ids] += self._bias
        if self._allowed_ids is not None:
            kept = row[self._allowed_ids]
            row.fill(_BANNED)
            row[self._allowed_ids] = kept
        row[self._banned_ids] = _BANNED
        if num_output_tokens < self._sampling.min_tokens:
            row[self._stop_ids] = _BANNED
        if self._seen is not None:
            self._apply_penalties(row, self._seen)

    def _apply_penalties(self, row: Row, seen: _SeenTokens) -> None:
        """Repetition divides (Keskar et al. 2019, CTRL); presence and frequency subtract, as OpenAI documents."""
        sampling = self._sampling
        token_ids, counts = seen.arrays()
        values = row[token_ids]
        if sampling.repetition_penalty != 1.0:
            penalty = np.float32(sampling.repetition_penalty)
            values = np.where(values > 0, values / penalty, values * penalty)
        values -= np.float32(sampling.frequency_penalty) * counts
        values -= np.float32(sampling.presence_penalty) * (counts > 0)
        row[token_ids] = values


class _SeenTokens:
    """Distinct tokens of a request and how often each is in its output (0: in the prompt only)."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}
        self._ids = np.zeros(256, dtype=np.int64)
        self._counts = np.zeros(256, dtype=np.float32)

    def add(self, token_ids: Sequence[int], count: int) -> None:
        for token_id in token_ids:
            slot = self._slots.get(token_id)
            if slot is None:
                slot = self._slots[token_id] = len(self._slots)
                if slot == len(self._ids):
                    self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                    self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
                self._ids[slot] = token_id
            self._counts[slot] += count

    def arrays(self) -> tuple[TokenIds, npt.NDArray[np.float32]]:
        """Ids [N] and counts [N]."""
        size = len(self._slots)
        return self._ids[:size], self._counts[:size]


def _ids(token_ids: Iterable[int], vocab_size: int) -> TokenIds:
    return np.array([i for i in token_ids if 0 <= i < vocab_size], dtype=np.int64)
