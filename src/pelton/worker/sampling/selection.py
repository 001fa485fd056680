"""The largest entries of a row without sorting the row. Legend: V vocabulary."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.float32]  # [V]
TokenIds = npt.NDArray[np.int64]

_DEPTH = 64


def top_ids(row: Row, count: int) -> TokenIds:
    """Ids of the `count` largest of `row`, largest first, equal ones by id.

    Entries of -inf may be left out. The row is cut into strided sets of 64: the count-th largest of
    the sets' maxima bounds the count-th largest entry from below, so only entries above it are sorted.
    """
    num_sets = len(row) // _DEPTH
    if count > num_sets // 2:
        return sort_by_value(np.arange(len(row)), row)[:count]
    maxima = row[: num_sets * _DEPTH].reshape(_DEPTH, num_sets).max(axis=0)
    threshold = np.partition(maxima, num_sets - count)[num_sets - count]
    candidates = np.flatnonzero(row >= threshold if threshold > -np.inf else row > threshold)
    return sort_by_value(candidates, row[candidates])[:count]


def sort_by_value(token_ids: TokenIds, values: Row) -> TokenIds:
    """`token_ids` by descending value, equal values by id.

    Value and id are packed into one integer, since a stable argsort is ten times slower than a sort.
    """
    bits = (values + np.float32(0.0)).view(np.int32)  # adding 0 makes -0.0 equal to 0.0
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the order of the floats, as integers
    keys = (~ascending).astype(np.int64) << 32 | token_ids
    keys.sort()
    return keys & 0xFFFFFFFF
