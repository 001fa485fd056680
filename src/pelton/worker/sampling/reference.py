"""`ReferenceSampler`: rows one by one, in numpy. Obvious rather than fast; what other samplers are tested against.

Legend as in `sampler.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from pelton.core.output import TokenLogprobs
from pelton.core.sampling_params import SamplingParams
from pelton.worker.sampling.draw import draw_token
from pelton.worker.sampling.logit_editor import LogitEditor
from pelton.worker.sampling.logprobs import token_logprobs
from pelton.worker.sampling.sampler import ALL_BANNED, OVERFLOW, Logits, Samples, TokenMask, not_finite
from pelton.worker.sampling.selection import Row
from pelton.worker.sampling.uniform import uniform_at


class ReferenceRow:
    """Implements `SamplingRow`."""

    def __init__(self, sampling: SamplingParams, seed: int, eos_token_ids: Iterable[int], vocab_size: int) -> None:
        self.sampling = sampling
        self.seed = seed
        self._editor = None
        if sampling.edits_logits:
            self._editor = LogitEditor(sampling, eos_token_ids, vocab_size)

    def add_prompt(self, token_ids: Sequence[int]) -> None:
        if self._editor is not None:
            self._editor.add_prompt(token_ids)

    def add_output(self, token_ids: Sequence[int]) -> None:
        if self._editor is not None:
            self._editor.add_output(token_ids)

    def edited(self, logits: Row, position: int, mask: TokenMask | None) -> Row:
        """`logits` themselves, or a copy with the edits that the settings and the grammar ask for."""
        if self._editor is None and mask is None:
            return logits
        row = logits.copy()
        if mask is not None:
            is_allowed = np.unpackbits(mask.view(np.uint8), count=len(row), bitorder="little")
            row[is_allowed == 0] = -np.inf
        if self._editor is not None:
            self._editor.apply(row, position)
        return row


class ReferenceSampler:
    """Implements `Sampler`."""

    def __init__(self, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)

    def make_row(self, sampling: SamplingParams, seed: int) -> ReferenceRow:
        return ReferenceRow(sampling, seed, self._eos_token_ids, self._vocab_size)

    def sample(
        self,
        logits: Logits,
        rows: Sequence[ReferenceRow],
        positions: Sequence[int],
        masks: Sequence[TokenMask | None] | None = None,
    ) -> Samples:
        samples = Samples([], {}, {})
        # An overflow is looked for in the result.
        with np.errstate(all="ignore"):
            for i, (row, position) in enumerate(zip(rows, positions, strict=True)):
                answer = _sample_row(logits[i], row, position, None if masks is None else masks[i])
                if isinstance(answer, str):
                    samples.problems[i] = answer
                    answer = -1
                elif row.sampling.logprobs is not None:
                    samples.logprobs[i] = token_logprobs(logits[i], answer, row.sampling.logprobs)
                samples.token_ids.append(answer)
        return samples

    def try_sample_late(self, logits: Logits, rows: Sequence[ReferenceRow], positions: Sequence[int]) -> None:
        """Nothing is late on the host."""

    def token_logprobs(self, logits: Logits, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs] | None:
        if not np.isfinite(logits.max(axis=1)).all():
            return None
        return [token_logprobs(logits[i], token_id, num_top) for i, token_id in enumerate(token_ids)]


def _sample_row(logits: Row, row: ReferenceRow, position: int, mask: TokenMask | None) -> int | str:
    """A token id, or what is wrong."""
    greatest = float(logits.max())  # a NaN counts as the maximum
    if not math.isfinite(greatest):
        return not_finite(greatest)
    edited = row.edited(logits, position, mask)
    best_id = int(edited.argmax())  # ties go to the lowest id
    best_logit = float(edited[best_id])
    if best_logit == -math.inf:
        return ALL_BANNED
    if not math.isfinite(best_logit):
        return OVERFLOW
    if row.sampling.is_greedy:
        return best_id
    return draw_token(edited, best_logit, row.sampling, uniform_at(row.seed, position))
