"""`prepare_forward_batch`: the rows of a step as the arrays that a program takes.

Between two steps nothing computes, and what computed last has put this code out of the caches: a numpy call costs 10 us
there. So what has a value per request is made as lists; of a step that only decodes, that is everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np

from pelton.core.batch import NULL_BLOCK_ID
from pelton.worker.forward_batch import Adapters, ForwardBatch, GroupBatch, Ints
from pelton.worker.layers.rotary import RotaryTable, Rotation
from pelton.worker.step_pieces import StepRow


def prepare_forward_batch(
    rows: Sequence[StepRow], rotary_tables: Sequence[RotaryTable], block_size: int
) -> ForwardBatch:
    """`rotary_tables` has one entry per KV group."""
    lengths = [len(row.token_ids) for row in rows]
    query_start_loc = [0, *accumulate(lengths)]
    token_ids = [*chain.from_iterable(row.token_ids for row in rows)]
    positions = _positions(rows, lengths, query_start_loc)
    seq_lens = [row.end for row in rows]
    num_positions = max(seq_lens)
    rotations = {table: Rotation(table, positions, num_positions) for table in rotary_tables}
    groups = []
    for group_id, rotary_table in enumerate(rotary_tables):
        tables = _padded_tables(rows, group_id)
        if len(token_ids) == len(rows):
            slots = np.array([_next_slot(row, group_id, block_size) for row in rows])
        else:
            block_of_token, offset = np.divmod(positions, block_size)
            slots = tables[_row_of_token(lengths), block_of_token] * block_size + offset
        groups.append(GroupBatch(slots, tables, rotations[rotary_table]))
    sampling = [end - 1 for row, end in zip(rows, query_start_loc[1:], strict=True) if row.samples]
    return ForwardBatch(
        np.array(token_ids),
        np.array(query_start_loc),
        np.array(seq_lens),
        tuple(groups),
        np.array(sampling, dtype=np.int64),
        _adapters_of(rows, lengths),
    )


def _row_of_token(lengths: Sequence[int]) -> Ints:
    return np.repeat(np.arange(len(lengths)), lengths)


def _positions(rows: Sequence[StepRow], lengths: Sequence[int], query_start_loc: Sequence[int]) -> Ints:
    """[T]."""
    starts = [row.scheduled.num_computed_tokens for row in rows]
    if query_start_loc[-1] == len(rows):
        return np.array(starts)
    shifts = np.subtract(starts, query_start_loc[:-1])
    return np.arange(query_start_loc[-1]) + np.repeat(shifts, lengths)


def _next_slot(row: StepRow, group_id: int, block_size: int) -> int:
    block, offset = divmod(row.scheduled.num_computed_tokens, block_size)
    return row.scheduled.block_tables[group_id][block] * block_size + offset


def _padded_tables(rows: Sequence[StepRow], group_id: int) -> Ints:
    """[R, B], padded with NULL_BLOCK_ID."""
    tables = [row.state.block_table(group_id, row.scheduled.block_tables[group_id]) for row in rows]
    if len(tables) == 1:
        return tables[0][None]
    padded = np.full((len(rows), max(map(len, tables))), NULL_BLOCK_ID)
    for i, table in enumerate(tables):
        padded[i, : len(table)] = table
    return padded


def _adapters_of(rows: Sequence[StepRow], lengths: Sequence[int]) -> Adapters:
    """The adapters of a step, each with its tokens."""
    found: dict[int, tuple[Any, list[int]]] = {}
    for index, row in enumerate(rows):
        if row.adapter is not None:
            found.setdefault(id(row.adapter), (row.adapter, []))[1].append(index)
    if not found:
        return ()
    row_of_token = _row_of_token(lengths)
    return tuple((adapter, np.flatnonzero(np.isin(row_of_token, own))) for adapter, own in found.values())
