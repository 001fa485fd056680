"""`prepare_forward_batch`: the rows of a step as the arrays that a program takes.

Between two steps nothing computes. There a numpy call costs some 10 us, as kernels have just put its code out of the
caches, and one that lets go of the interpreter's lock waits for the engine's loop. So numpy only takes finished lists.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, pairwise
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
    query_start_loc = [0, *accumulate(len(row.token_ids) for row in rows)]
    own_tokens = [range(*ends) for ends in pairwise(query_start_loc)]
    seq_lens = [row.end for row in rows]
    positions = _joined(range(end - len(row.token_ids), end) for row, end in zip(rows, seq_lens, strict=True))
    rotations = {table: Rotation(table, positions, max(seq_lens)) for table in rotary_tables}
    groups = [
        GroupBatch(
            _joined(slots for row in rows for slots in _slots(row, group_id, block_size)),
            _padded_tables(rows, group_id),
            rotations[rotary_table],
        )
        for group_id, rotary_table in enumerate(rotary_tables)
    ]
    return ForwardBatch(
        _joined(row.token_ids for row in rows),
        np.array(query_start_loc),
        np.array(seq_lens),
        tuple(groups),
        _joined(own[-1:] for row, own in zip(rows, own_tokens, strict=True) if row.samples),
        _adapters_of(rows, own_tokens),
    )


def _joined(pieces: Iterable[Iterable[int]]) -> Ints:
    return np.array([*chain.from_iterable(pieces)], dtype=np.int64)


def _slots(row: StepRow, group_id: int, block_size: int) -> Iterator[range]:
    """Where its tokens go, a block at a time."""
    table, position = row.scheduled.block_tables[group_id], row.scheduled.num_computed_tokens
    end = row.end
    while position < end:
        block, offset = divmod(position, block_size)
        first, count = table[block] * block_size + offset, min(block_size - offset, end - position)
        yield range(first, first + count)
        position += count


def _padded_tables(rows: Sequence[StepRow], group_id: int) -> Ints:
    """[R, B], padded with NULL_BLOCK_ID."""
    tables = [row.state.block_table(group_id, row.scheduled.block_tables[group_id]) for row in rows]
    padded = np.full((len(rows), max(map(len, tables))), NULL_BLOCK_ID)
    for i, table in enumerate(tables):
        padded[i, : len(table)] = table
    return padded


def _adapters_of(rows: Sequence[StepRow], own_tokens: Sequence[range]) -> Adapters:
    """The adapters of a step, each with its tokens."""
    found: dict[int, tuple[Any, list[range]]] = {}
    for row, own in zip(rows, own_tokens, strict=True):
        if row.adapter is not None:
            found.setdefault(id(row.adapter), (row.adapter, []))[1].append(own)
    return tuple((adapter, _joined(own)) for adapter, own in found.values())
