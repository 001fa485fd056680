"""Temperature, top-k, top-p, min-p, and the draw: inverse CDF of one uniform number.

Every function sees one row, so that a request's token cannot depend on its neighbours in the batch
(law 3). Weights are exp((logit - maximum) / temperature): the most likely token has weight 1.
Legend: V vocabulary, K tokens kept.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pelton.core.sampling_params import SamplingParams
from pelton.worker.sampling.selection import Row, TokenIds, sort_by_value, top_ids

Weights = npt.NDArray[np.float64]  # [K]

# A smaller one makes float32 divide 0 by 0; at this one everything but the maximum has weight 0.
_MIN_TEMPERATURE = 1e-30
_DEPTH = 64


def draw_token(row: Row, max_logit: float, sampling: SamplingParams, uniform: float) -> int:
    """Draw from edited logits `row` whose maximum, `max_logit`, is finite."""
    temperature = max(sampling.temperature, _MIN_TEMPERATURE)
    if 0 < sampling.top_k < len(row):
        token_ids = top_ids(row, sampling.top_k)
        weights = _weights(row[token_ids], max_logit, temperature)
        total = float(np.cumsum(weights)[-1])
    elif sampling.top_p < 1.0:
        token_ids, weights, total = _nucleus(row, max_logit, temperature, sampling.top_p)
    elif sampling.min_p > 0.0:
        # A shade too low, so that rounding is left to the comparison of weights.
        least_logit = max_logit + temperature * (math.log(sampling.min_p) - 1e-3)
        token_ids = np.flatnonzero(row >= least_logit)
        weights = _weights(row[token_ids], max_logit, temperature)
        is_kept = weights >= sampling.min_p
        return int(token_ids[is_kept][_search(np.cumsum(weights[is_kept]), uniform)])
    else:
        return _draw_from_all(row, max_logit, temperature, uniform)
    # From here on tokens are sorted, so that every filter keeps a head of them.
    cumulative = np.cumsum(weights)
    num_kept = len(weights)
    if sampling.top_p < 1.0:
        num_kept = min(num_kept, int(np.searchsorted(cumulative, sampling.top_p * total)) + 1)
    if sampling.min_p > 0.0:
        num_kept = min(num_kept, int(np.count_nonzero(weights >= sampling.min_p)))
    return int(token_ids[_search(cumulative[:num_kept], uniform)])


def _weights(logits: Row, max_logit: float, temperature: float) -> Weights:
    return np.exp((logits.astype(np.float64) - max_logit) / temperature)


def _all_weights(row: Row, max_logit: float, temperature: float) -> Row:
    """Float32 weights of the whole row, padded with 0 to a multiple of 64 tokens."""
    weights = np.zeros(-(-len(row) // _DEPTH) * _DEPTH, dtype=np.float32)
    head = weights[: len(row)]
    np.subtract(row, np.float32(max_logit), out=head)
    if temperature != 1.0:
        np.divide(head, np.float32(temperature), out=head)
    np.exp(head, out=head)
    return weights


def _nucleus(row: Row, max_logit: float, temperature: float, top_p: float) -> tuple[TokenIds, Weights, float]:
    """Ids and weights, most likely first, of a head that holds mass `top_p`; and the mass of all tokens.

    Only tokens above a threshold are sorted. A high one is tried first; the other is safe, since all
    tokens below it together weigh less than what top-p leaves out.
    """
    weights = _all_weights(row, max_logit, temperature)
    total = float(weights.sum(dtype=np.float64))
    for threshold in (math.exp(-5), (1.0 - top_p) * total / len(row)):
        token_ids = np.flatnonzero(weights >= threshold)
        if weights[token_ids].sum(dtype=np.float64) >= top_p * total:
            break
    token_ids = sort_by_value(token_ids, weights[token_ids])
    return token_ids, weights[token_ids].astype(np.float64), total


def _draw_from_all(row: Row, max_logit: float, temperature: float, uniform: float) -> int:
    """The row as a matrix of 64 rows: draw a column, then a token in it. Tokens are ordered by column, then id."""
    weights = _all_weights(row, max_logit, temperature).reshape(_DEPTH, -1)
    cumulative = np.cumsum(weights.sum(axis=0, dtype=np.float64))
    column = _search(cumulative, uniform)
    before = float(cumulative[column - 1]) if column else 0.0
    within = np.cumsum(weights[:, column], dtype=np.float64)
    index = int(np.searchsorted(within, uniform * float(cumulative[-1]) - before, side="right"))
    # The two sums may differ in their last bit; a column then ends with its last token of any weight.
    last = int(np.searchsorted(within, within[-1]))
    return min(index, last) * weights.shape[1] + column


def _search(cumulative: Weights, uniform: float) -> int:
    """First index whose cumulative weight exceeds the drawn mass; never one of weight 0.

    `uniform` is at most 1 - 2**-53, so its product with the total always rounds below the total.
    """
    return int(np.searchsorted(cumulative, uniform * float(cumulative[-1]), side="right"))
