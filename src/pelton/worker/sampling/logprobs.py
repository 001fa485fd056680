"""Log-probabilities of raw logits, one row at a time."""

from __future__ import annotations

import math

import numpy as np

from pelton.core.output import TokenLogprobs
from pelton.worker.sampling.selection import Row, top_ids
from pelton.worker.sampling.weights import ONE, weights_of


def token_logprobs(row: Row, token_id: int, num_top: int) -> TokenLogprobs:
    """Logprob and rank of `token_id` and the `num_top` most likely tokens, from raw logits.

    The row must hold no NaN and no +inf. Ranks and `top` order equal logits by id; `top` leaves out -inf.
    """
    max_logit = float(row.max())
    log_normalizer = max_logit + math.log(int(weights_of(row, max_logit, 1.0).sum()) / ONE)
    logit = row[token_id]
    num_above = np.count_nonzero(row > logit) + np.count_nonzero(row[:token_id] == logit)
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        ids = top_ids(row, num_top)
        ids = ids[row[ids] > -np.inf]
        top = tuple((i, value - log_normalizer) for i, value in zip(ids.tolist(), row[ids].tolist(), strict=True))
    return TokenLogprobs(token_id, float(logit) - log_normalizer, int(num_above) + 1, top)
