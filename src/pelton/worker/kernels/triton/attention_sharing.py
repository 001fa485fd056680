"""Which requests of a step have blocks in common, and how many chunks of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def find_shared_prefixes(
    block_tables: Ints, num_whole: Ints, chunk_positions: int, block_size: int
) -> list[tuple[Ints, int]]:
    """Groups (rows of `block_tables` [R, B], chunks that they all begin with); no row is in two.

    `num_whole` [R] chunks of a row may be shared. Rows that begin with one block are compared with one of them,
    and grouped at the length that spares most reading: a step's rows mostly have one system prompt in common,
    and what only some of them share beyond it is left to each.
    """
    if len(block_tables) < 2 or not block_tables.shape[1]:
        return []
    order = np.argsort(block_tables[:, 0], kind="stable")
    order = order[num_whole[order] > 0]
    leads = block_tables[order, 0]
    bounds = np.flatnonzero(np.diff(leads)) + 1
    groups = []
    for rows in np.split(order, bounds):
        if len(rows) < 2:
            continue
        num_shared = _num_shared(block_tables[rows], num_whole[rows], chunk_positions, block_size)
        longest_first = np.argsort(-num_shared, kind="stable")
        spared = num_shared[longest_first] * np.arange(len(rows))  # chunks, if that row is the last one
        best = int(np.argmax(spared))
        if spared[best] > 0:
            num_chunks = int(num_shared[longest_first[best]])
            groups.append((np.sort(rows[num_shared >= num_chunks]), num_chunks))
    return groups


def _num_shared(tables: Ints, num_whole: Ints, chunk_positions: int, block_size: int) -> Ints:
    """Whole chunks that each row has in common with the row that has most; that one's own are what another has."""
    leader = int(np.argmax(num_whole))
    differs = tables != tables[leader]
    num_same = np.where(differs.any(axis=1), differs.argmax(axis=1), tables.shape[1])
    num_shared: Ints = np.minimum(num_whole, num_same * block_size // chunk_positions)
    num_shared[leader] = np.delete(num_shared, leader).max()
    return num_shared
