"""Chooses the next token of every request that reached its end in this step.

Legend: S rows (requests that sample), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pelton.core.output import TokenLogprobs
from pelton.worker.request_state import RequestState
from pelton.worker.sampling.draw import draw_token
from pelton.worker.sampling.logprobs import token_logprobs
from pelton.worker.sampling.selection import Row
from pelton.worker.sampling.uniform import uniform_at


@dataclass(frozen=True, slots=True)
class Sample:
    """One row's answer: a token, or in `problem` why there is none."""

    token_id: int = -1
    logprobs: TokenLogprobs | None = None
    problem: str | None = None


def sample(logits: npt.NDArray[np.float32], states: Sequence[RequestState]) -> list[Sample]:
    """One `Sample` per row of `logits` [S, V] float32, which may be edited in place.

    Rows are handled one by one in numpy, on one thread: a row's answer is a function of that row and
    its state alone, bit for bit (law 3), and a call per row costs less than a parallel one per batch.
    """
    # An overflow is looked for in the result, and an underflow is a weight of 0.
    with np.errstate(all="ignore"):
        return [_sample_row(row, state) for row, state in zip(logits, states, strict=True)]


def _sample_row(row: Row, state: RequestState) -> Sample:
    best_id = int(row.argmax())  # ties go to the lowest id; a NaN counts as the maximum
    best_logit = float(row[best_id])
    if not math.isfinite(best_logit):
        return Sample(problem=f"the model's logits are not finite (the greatest is {best_logit})")
    sampling = state.sampling
    raw = row
    if state.editor is not None:
        row = row.copy() if sampling.logprobs is not None else row
        state.editor.apply(row, len(state.output_token_ids))
        best_id = int(row.argmax())
        best_logit = float(row[best_id])
        if best_logit == -math.inf:
            return Sample(problem="no token is left to sample: the request's settings ban all of them")
        if not math.isfinite(best_logit):
            return Sample(problem="penalties or logit_bias made the logits overflow")
    if sampling.is_greedy:
        token_id = best_id
    else:
        uniform = uniform_at(state.seed, len(state.output_token_ids))
        token_id = draw_token(row, best_logit, sampling, uniform)
    logprobs = None if sampling.logprobs is None else token_logprobs(raw, token_id, sampling.logprobs)
    return Sample(token_id, logprobs)
