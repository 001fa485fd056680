"""Temperature, top-k, top-p, min-p, and the draw: inverse CDF of one uniform number.

Every function sees one row, so that a request's token cannot depend on its neighbours in the batch
(law 3). Legend: V vocabulary, K tokens kept.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from pelton.core.sampling_params import SamplingParams
from pelton.worker.sampling.selection import top_ids

Weights = npt.NDArray[np.float64]

# A smaller one makes float32 divide 0 by 0; at this one everything but the maximum has weight 0.
_MIN_TEMPERATURE = 1e-30
# Sizes of the head sorted for top-p before the whole row is.
_HEAD_SIZES = (64, 512)
_BLOCK = 64


def draw_token(row: torch.Tensor, max_logit: float, sampling: SamplingParams, uniform: float) -> int:
    """Draw from edited logits `row` [V] float32 whose maximum, `max_logit`, is finite."""
    scaled = (row - max_logit).div_(max(sampling.temperature, _MIN_TEMPERATURE))
    if sampling.top_k == 0 and sampling.top_p >= 1.0:
        weights = scaled.exp_()
        if sampling.min_p > 0.0:
            # The weight of the maximum is 1, so weights are already relative to it.
            weights.masked_fill_(weights < sampling.min_p, 0.0)
        return _draw_from_row(weights, uniform)
    token_ids, weights, total = _sorted_head(scaled, sampling.top_k, sampling.top_p)
    cumulative = np.cumsum(weights)
    num_kept = len(weights)
    if sampling.top_p < 1.0:
        num_kept = min(num_kept, int(np.searchsorted(cumulative, sampling.top_p * total)) + 1)
    if sampling.min_p > 0.0:
        num_kept = min(num_kept, int(np.count_nonzero(weights >= sampling.min_p)))
    return int(token_ids[_search(cumulative[:num_kept], uniform)])


def _sorted_head(scaled: torch.Tensor, top_k: int, top_p: float) -> tuple[npt.NDArray[np.int64], Weights, float]:
    """Ids and weights, most likely first, that hold all tokens kept; and the mass that top_p refers to."""
    vocab_size = scaled.shape[0]
    if 0 < top_k < vocab_size:
        token_ids = top_ids(scaled, top_k)
        weights = scaled[token_ids].exp_().double().numpy()
        return token_ids.numpy(), weights, float(np.cumsum(weights)[-1])
    all_weights = scaled.exp()
    total = all_weights.sum(dtype=torch.float64).item()
    for size in (*_HEAD_SIZES, vocab_size):
        token_ids = top_ids(scaled, size)
        weights = all_weights[token_ids].double().numpy()
        if weights.sum() >= top_p * total:
            break
    return token_ids.numpy(), weights, total


def _draw_from_row(weights: torch.Tensor, uniform: float) -> int:
    """Draw from unsorted float32 `weights` [V]: first a block of 64 ids, then an id within it."""
    vocab_size = weights.shape[0]
    padded = torch.nn.functional.pad(weights, (0, -vocab_size % _BLOCK)) if vocab_size % _BLOCK else weights
    blocks = padded.view(-1, _BLOCK)
    cumulative = np.cumsum(blocks.sum(dim=1, dtype=torch.float64).numpy())
    block = _search(cumulative, uniform)
    before = float(cumulative[block - 1]) if block else 0.0
    within = np.cumsum(blocks[block].double().numpy())
    offset = int(np.searchsorted(within, uniform * float(cumulative[-1]) - before, side="right"))
    # The two sums may differ in their last bit; the end of the block is then its last token of weight.
    last = int(np.searchsorted(within, within[-1]))
    return block * _BLOCK + min(offset, last)


def _search(cumulative: Weights, uniform: float) -> int:
    """First index whose cumulative weight exceeds the drawn mass; never one of weight 0.

    `uniform` is at most 1 - 2**-53, so its product with the total always rounds below the total.
    """
    return int(np.searchsorted(cumulative, uniform * float(cumulative[-1]), side="right"))
