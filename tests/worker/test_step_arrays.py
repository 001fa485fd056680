"""The arrays of a step, token by token, with blocks that lie nowhere near one another."""

from __future__ import annotations

import numpy as np
import pytest

from pelton.core.batch import RequestContext, ScheduledRequest
from pelton.core.model_spec import RopeSpec
from pelton.core.sampling_params import SamplingParams
from pelton.worker.layers.rotary import RotaryTable
from pelton.worker.request_state import RequestState
from pelton.worker.sampling.reference import ReferenceSampler
from pelton.worker.step_arrays import prepare_forward_batch
from pelton.worker.step_pieces import StepRow

BLOCK_SIZE = 4
GREEDY = SamplingParams(temperature=0.0)
SAMPLER = ReferenceSampler(50, {0})
TABLE = RotaryTable(RopeSpec(theta=10_000.0, rotary_dim=6))
OTHER = RotaryTable(RopeSpec(theta=100.0, rotary_dim=6))
ADAPTER = object()


def make_row(index: int, start: int, count: int, *, samples: bool = True, adapter: object = None) -> StepRow:
    token_ids = tuple(range(10 * index, 10 * index + count))
    num_blocks = -(-(start + count) // BLOCK_SIZE)
    tables = tuple(tuple(100 * index + 50 * group - 3 * block for block in range(num_blocks)) for group in range(2))
    scheduled = ScheduledRequest(str(index), token_ids, start, tables, GREEDY, samples)
    state = RequestState(RequestContext((1, 2), (), seed=9), GREEDY, SAMPLER)
    return StepRow(index, scheduled, state, token_ids, adapter)


STEPS = {
    "one decode": [make_row(1, 9, 1)],
    "decodes": [make_row(1, 0, 1), make_row(2, 11, 1, adapter=ADAPTER), make_row(3, 4, 1)],
    "a token that is not the last": [make_row(1, 7, 1, samples=False)],
    "one prompt": [make_row(1, 0, 9)],
    "a chunk": [make_row(2, 6, 5, samples=False, adapter=ADAPTER)],
    "all kinds": [
        make_row(1, 5, 3),
        make_row(2, 8, 1),
        make_row(3, 0, 6, samples=False),
        make_row(4, 3, 1, adapter=ADAPTER),
    ],
}


@pytest.mark.parametrize("name", STEPS)
def test_every_token_has_its_place(name: str) -> None:
    rows = STEPS[name]
    batch = prepare_forward_batch(rows, (TABLE, OTHER), BLOCK_SIZE)
    tokens = [(row, row.scheduled.num_computed_tokens + i) for row in rows for i in range(len(row.token_ids))]
    assert batch.token_ids.tolist() == [token_id for row in rows for token_id in row.token_ids]
    assert batch.query_start_loc.tolist() == [sum(len(row.token_ids) for row in rows[:i]) for i in range(len(rows) + 1)]
    assert batch.seq_lens.tolist() == [row.end for row in rows]
    last = [max(i for i, (owner, _) in enumerate(tokens) if owner is row) for row in rows if row.samples]
    assert batch.logits_indices.tolist() == last
    for index, (group, table) in enumerate(zip(batch.groups, (TABLE, OTHER), strict=True)):
        tables = [row.scheduled.block_tables[index] for row in rows]
        width = max(map(len, tables))
        assert group.block_tables.tolist() == [[*own, *[0] * (width - len(own))] for own in tables]
        assert group.slot_mapping.tolist() == [
            row.scheduled.block_tables[index][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            for row, position in tokens
        ]
        assert group.rotation.positions.tolist() == [position for _, position in tokens]
        whole = table.up_to(1)
        for found, all_of_them in zip((group.cos, group.sin), whole, strict=True):
            np.testing.assert_array_equal(found, [all_of_them[position] for _, position in tokens])
    own = [i for i, (row, _) in enumerate(tokens) if row.adapter is ADAPTER]
    assert [(adapter, indices.tolist()) for adapter, indices in batch.adapters] == ([(ADAPTER, own)] if own else [])
    arrays = [batch.token_ids, batch.query_start_loc, batch.seq_lens, batch.logits_indices]
    arrays += [array for group in batch.groups for array in (group.slot_mapping, group.block_tables)]
    assert {array.dtype for array in arrays} == {np.dtype(np.int64)}
    assert all(array.flags.c_contiguous for array in arrays)
