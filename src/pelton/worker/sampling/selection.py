"""The largest entries of a row without sorting the row. Legend: V vocabulary."""

from __future__ import annotations

import torch

_BLOCK = 64


def top_ids(row: torch.Tensor, count: int) -> torch.Tensor:
    """Ids of the `count` largest of `row` [V], largest first, equal ones by id; int64.

    Entries of -inf may be left out. A row is cut into blocks of 64: the count-th largest of the
    blocks' maxima bounds the count-th largest entry from below, so only entries above it are sorted.
    """
    num_blocks = row.shape[0] // _BLOCK
    if count > num_blocks // 2:
        return torch.sort(row, descending=True, stable=True).indices[:count]
    maxima = row[: num_blocks * _BLOCK].view(num_blocks, _BLOCK).amax(dim=1)
    threshold = torch.topk(maxima, count).values[-1].item()
    is_candidate = row > threshold if threshold == float("-inf") else row >= threshold
    candidates = is_candidate.nonzero().view(-1)
    order = torch.sort(row[candidates], descending=True, stable=True).indices[:count]
    return candidates[order]
