"""Lists of attention work: every row meets each of its chunks once, in order, and grids stay within their bounds."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from pelton.worker.kernels.ops import AttentionShape
from pelton.worker.kernels.triton.attention_config import AttentionConfig, choose_config
from pelton.worker.kernels.triton.attention_plan import EACH, FOLD, RESULT, HostPlan, PlanSizes, make_plan
from pelton.worker.kernels.triton.attention_sharing import find_shared_prefixes

pytestmark = pytest.mark.torch  # their package imports it


def random_batch(rng: np.random.Generator, block_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts, lengths, tables: groups of requests whose tables begin alike, some of one token, some of many."""
    seq_lens, num_new = [], []
    for _ in range(int(rng.integers(1, 12))):
        seq_lens.append(int(rng.integers(1, 400)))
        num_new.append(min(seq_lens[-1], int(rng.choice([1, 1, 1, 2, 5, 40, 200]))))
    width = max(-(-seq_len // block_size) for seq_len in seq_lens)
    tables = np.arange(1, 1 + len(seq_lens) * width).reshape(len(seq_lens), width)
    for row in range(1, len(seq_lens)):
        num_shared = int(rng.integers(0, width + 1))
        tables[row, :num_shared] = tables[rng.integers(0, row), :num_shared]
    return np.cumsum([0, *num_new]), np.array(seq_lens), tables


def check(plan: HostPlan, starts: np.ndarray, seq_lens: np.ndarray, tables: np.ndarray, window: int | None) -> None:
    """Walks through the items as the kernels do."""
    shape, chunk = plan.shape, plan.config.chunk_positions
    group = shape.num_heads // shape.num_kv_heads
    parts: dict[int, dict[int, list[tuple[int, int]]]] = defaultdict(dict)  # token -> slot -> chunks with block of each
    whole: dict[int, list[int]] = {}
    for items, num_rows in ((plan.narrow_items, plan.config.narrow_rows), (plan.wide_items, plan.config.wide_rows)):
        for first, num_tokens, table, first_chunk, end_chunk, mode, *_ in items.tolist():
            assert 0 < num_tokens * group <= num_rows
            assert first_chunk < end_chunk
            blocks = [int(plan.tables[table + c * chunk // shape.block_size]) for c in range(first_chunk, end_chunk)]
            chunks = list(zip(range(first_chunk, end_chunk), blocks, strict=True))
            for token in plan.tile_tokens[first : first + num_tokens].tolist():
                if mode == RESULT:
                    assert token not in whole
                    whole[token] = [c for c, _ in chunks]
                    blocks_of = chunks
                elif mode == FOLD:
                    slot = int(plan.slots[token]) + end_chunk - 1
                    assert slot not in parts[token]
                    parts[token][slot] = blocks_of = chunks
                else:
                    assert mode == EACH
                    blocks_of = chunks
                    for number, block in chunks:
                        slot = int(plan.slots[token]) + number
                        assert slot not in parts[token]
                        parts[token][slot] = [(number, block)]
                row = int(np.searchsorted(starts, token, side="right")) - 1
                for number, block in blocks_of:
                    assert number * chunk >= seq_lens[row] or block == tables[row, number * chunk // shape.block_size]
    used: set[int] = set()
    merged = {token: (first, count) for token, first, count, _ in plan.merges.tolist()}
    assert set(merged) == {token for token, slots in parts.items() if slots}
    for row in range(len(seq_lens)):
        for token in range(starts[row], starts[row + 1]):
            position = int(seq_lens[row] - (starts[row + 1] - token))
            assert plan.positions[token] == position
            if token in merged:
                first, count = merged[token]
                assert token not in whole
                assert sorted(parts[token]) == list(range(first, first + count))
                assert first + count <= plan.num_slots
                assert not used & set(range(first, first + count))
                used |= set(range(first, first + count))
                seen = [number for slot in range(first, first + count) for number, _ in parts[token][slot]]
            else:
                seen = whole[token]
            least = 0 if window is None else max(0, position - window + 1) // chunk
            assert seen == list(range(seen[0], seen[-1] + 1))
            assert seen[0] <= least
            assert seen[-1] >= position // chunk


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("block_size", [16, 5, 48])
def test_random_batches(block_size: int, window: int | None) -> None:
    rng = np.random.default_rng(block_size)
    for _ in range(60):
        batch = random_batch(rng, block_size)
        shape = AttentionShape(int(rng.choice([4, 7])), 1, 64, block_size, window)
        config = AttentionConfig(
            chunk_positions=32,
            narrow_rows=16,
            wide_rows=32,
            wide_from=int(rng.choice([1, 4])),
            num_programs=int(rng.choice([1, 8, 100])),
            max_slots=int(rng.choice([20, 4096])),
        )
        plan = make_plan(shape, *batch, config)
        check(plan, *batch, window)
        words = plan.pack(plan.sizes.rounded())
        views = plan.sizes.rounded().views(words)
        assert (views[0][: plan.narrow_items.size] == plan.narrow_items.reshape(-1)).all()
        assert not views[0][plan.narrow_items.size :].any()
        assert (views[-1][: len(plan.tables)] == plan.tables).all()


def test_decodes_stay_within_their_bounds() -> None:
    """What a captured graph has room for, whatever the contexts."""
    rng = np.random.default_rng(0)
    shape = AttentionShape(32, 8, 128, 16, None)
    config = choose_config(shape)
    for num_requests in (1, 3, 64, 256):
        for num_new in (1, 3):
            sizes = PlanSizes.for_decodes(num_requests, num_new, shape.num_kv_heads, config)
            for longest in (100, 3000, 20000):
                seq_lens = rng.integers(num_new, longest, num_requests)
                tables = np.arange(num_requests * 1250).reshape(num_requests, -1)
                tables[:, : 1000 // 16] = 0
                starts = np.arange(num_requests + 1) * num_new
                plan = make_plan(shape, starts, seq_lens, tables, config)
                assert sizes.holds(plan.sizes)
                assert plan.num_slots <= config.max_slots


def test_a_full_batch_is_not_split_and_a_single_long_context_is() -> None:
    shape = AttentionShape(32, 8, 128, 16, None)
    config = choose_config(shape)
    tables = np.arange(256 * 128).reshape(256, 128)
    plan = make_plan(shape, np.arange(257), np.full(256, 2048), tables, config)
    assert len(plan.narrow_items) == 256
    assert not len(plan.merges)
    plan = make_plan(shape, np.array([0, 1]), np.array([256 * 128 * 16]), tables.reshape(1, -1), config)
    assert len(plan.narrow_items) == 64  # times 8 heads: num_programs


def test_what_is_shared() -> None:
    """Two families of requests, each with blocks in common, and a request that is alone."""
    tables = np.array([[1, 2, 3, 4], [1, 2, 3, 5], [9, 2, 3, 4], [1, 2, 6, 7], [8, 8, 8, 0], [8, 8, 8, 8]])
    groups = find_shared_prefixes(tables, np.array([4, 4, 4, 4, 3, 4]), 16, 16)
    assert [(rows.tolist(), num_chunks) for rows, num_chunks in groups] == [([0, 1, 3], 2), ([4, 5], 3)]
    # A chunk is shared as a whole or not at all.
    groups = find_shared_prefixes(tables, np.array([2, 2, 2, 2, 1, 2]), 32, 16)
    assert [(rows.tolist(), num_chunks) for rows, num_chunks in groups] == [([0, 1, 3], 1), ([4, 5], 1)]
    assert find_shared_prefixes(tables, np.zeros(6, dtype=np.int64), 16, 16) == []
