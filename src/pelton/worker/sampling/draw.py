"""Temperature, top-k, top-p, min-p, and the draw: inverse CDF of one uniform number, tokens in order of id.

Legend: V vocabulary.
"""

from __future__ import annotations

import numpy as np

from pelton.core.sampling_params import SamplingParams
from pelton.worker.sampling.selection import Row, sort_by_value, top_ids
from pelton.worker.sampling.weights import drawn_weight, head_weight, least_weight, weights_of


def draw_token(row: Row, max_logit: float, sampling: SamplingParams, uniform: float) -> int:
    """Draw from edited logits `row` [V] whose maximum, `max_logit`, is finite."""
    token_ids = np.arange(len(row))
    if 0 < sampling.top_k < len(row):
        token_ids = top_ids(row, sampling.top_k)
    elif sampling.top_p < 1.0:
        token_ids = sort_by_value(token_ids, row)
    weights = weights_of(row[token_ids], max_logit, sampling.temperature)
    if sampling.top_p < 1.0:
        cumulative = np.cumsum(weights)
        num_kept = int(np.searchsorted(cumulative, head_weight(sampling.top_p, int(cumulative[-1])))) + 1
        token_ids, weights = token_ids[:num_kept], weights[:num_kept]
    if sampling.min_p > 0.0:
        is_kept = weights >= least_weight(sampling.min_p)
        token_ids, weights = token_ids[is_kept], weights[is_kept]
    order = np.argsort(token_ids)
    cumulative = np.cumsum(weights[order])
    drawn = drawn_weight(uniform, int(cumulative[-1]))
    return int(token_ids[order][np.searchsorted(cumulative, drawn, side="right")])
