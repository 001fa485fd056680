"""Log-probabilities of raw logits, one row at a time. Legend: V vocabulary."""

from __future__ import annotations

import math

import torch

from pelton.core.output import TokenLogprobs
from pelton.worker.sampling.selection import top_ids


def token_logprobs(row: torch.Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """Logprob and rank of `token_id` and the `num_top` most likely tokens, from raw logits `row` [V].

    The row must hold no NaN and no +inf. Ranks and `top` order equal logits by id.
    """
    max_logit = row.max().item()
    total = (row - max_logit).exp_().sum(dtype=torch.float64).item()
    log_normalizer = max_logit + math.log(total)
    logit = row[token_id]
    num_above = torch.count_nonzero(row > logit).item() + torch.count_nonzero(row[:token_id] == logit).item()
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        ids = top_ids(row, num_top)
        top = tuple((i, value - log_normalizer) for i, value in zip(ids.tolist(), row[ids].tolist(), strict=True))
    return TokenLogprobs(token_id, logit.item() - log_normalizer, int(num_above) + 1, top)
