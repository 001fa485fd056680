"""Triton's paged attention, interpreted: against float64, and law 3 bit for bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from pelton.worker.kernels.ops import AttentionShape
from pelton.worker.kernels.triton.attention import paged_attention, plan_attention
from pelton.worker.kernels.triton.attention_config import AttentionConfig, choose_config
from tests.worker.triton.attention_case import SMALL, Requests

pytestmark = pytest.mark.torch

# New tokens and KV length: at, before and behind the ends of tiles (16) and chunks (32).
MIXTURE = [(1, 70), (20, 20), (9, 45), (1, 1), (2, 64), (1, 33), (1, 32)]


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256, 33])
def test_head_sizes(head_dim: int) -> None:
    requests = Requests(MIXTURE, (2, 1, head_dim))
    requests.check(requests.run_all(scale=head_dim**-0.5), scale=head_dim**-0.5)


@pytest.mark.parametrize(("heads", "block_size"), [((3, 3, 16), 16), ((14, 2, 16), 5), ((18, 1, 16), 48)])
def test_groups_and_blocks(heads: tuple[int, int, int], block_size: int) -> None:
    config = replace(SMALL, narrow_rows=32) if heads[1] == 1 else SMALL
    requests = Requests(MIXTURE, heads, block_size=block_size, config=config)
    requests.check(requests.run_all())


@pytest.mark.parametrize("window", [1, 2, 20, 32, 33, 100])
def test_sliding_windows(window: int) -> None:
    requests = Requests([*MIXTURE[:3], (20, 90), (1, 64)], (2, 1, 16), window=window)
    requests.check(requests.run_all())


@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_softcaps(softcap: float) -> None:
    requests = Requests(MIXTURE[:3], (2, 1, 16), window=40)
    requests.check(requests.run_all(scale=1.0, softcap=softcap), scale=1.0, softcap=softcap, tolerance=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.002)])
def test_narrow_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    requests = Requests(MIXTURE[:3], (2, 1, 64), dtype=dtype)
    results = requests.run_all(scale=0.125)
    assert results[0].dtype is dtype
    requests.check(results, tolerance, scale=0.125)


def test_scores_may_be_large() -> None:
    """Maxima that rise from tile to tile, exponents out of the range of float32, and scores that are all alike."""
    requests = Requests([(3, 100), (10, 90), (1, 64)], (2, 1, 16))
    requests.caches[0] *= torch.linspace(1, 30, len(requests.caches[0])).view(-1, 1, 1, 1)
    requests.check(requests.run_all(scale=2.0), 1e-4, scale=2.0)
    requests.queries = [torch.zeros_like(query) for query in requests.queries]
    requests.check(requests.run_all())


def test_weights_may_vanish() -> None:
    """Chunks whose weights are all zero beside those of the first, and of the last."""
    requests = Requests([(1, 100), (1, 100)], (2, 1, 16))
    requests.queries = [torch.ones(1, 2, 16), -torch.ones(1, 2, 16)]
    for slots in requests.slots:
        requests.caches[0].flatten(0, 1)[slots] = torch.linspace(40, -40, 100).view(-1, 1, 1).expand(-1, 1, 16)
    requests.check(requests.run_all(scale=1.0), scale=1.0)


@pytest.mark.parametrize(("heads", "batch_invariant"), [((4, 1, 128), True), ((4, 1, 128), False), ((4, 1, 256), True)])
def test_shapes_for_the_device(heads: tuple[int, int, int], batch_invariant: bool) -> None:
    """The tiles that an H100 gets."""
    config = choose_config(AttentionShape(*heads, 16, None), batch_invariant=batch_invariant)
    requests = Requests([(1, 300), (20, 260), (2, 256)], heads, config=config)
    requests.check(requests.run_all(scale=0.1), scale=0.1)


@pytest.mark.parametrize(
    ("heads", "window", "softcap", "block_size"),
    [((2, 1, 40), None, None, 7), ((7, 1, 32), 40, 5.0, 16), ((2, 2, 33), 33, None, 16)],
)
def test_a_tokens_result_depends_on_nothing_else(
    heads: tuple[int, int, int], window: int | None, softcap: float | None, block_size: int
) -> None:
    """Law 3: chunks of any size, decodes, any company, items cut in any way, bit for bit."""
    work = [(20, 40), (10, 100), (1, 70)]
    requests = Requests(work, heads, window=window, block_size=block_size)
    expected = requests.run_all(softcap=softcap)
    requests.check(expected, 1e-5, softcap=softcap)
    for num_programs in (1, 1000):  # whole, and every chunk by itself
        for row, result in enumerate(requests.run_all(replace(SMALL, num_programs=num_programs), softcap=softcap)):
            assert torch.equal(result, expected[row]), (num_programs, row)
    for chunk in (1, 3, 9):
        parts = []
        for row, (num_tokens, _) in enumerate(work):
            bounds = [*range(num_tokens - min(num_tokens, 2 * chunk), num_tokens, chunk), num_tokens]
            parts += [(row, *pair) for pair in pairwise(bounds)]
        for (row, first, end), result in zip(parts, requests.run(parts[::-1], softcap=softcap)[::-1], strict=True):
            assert torch.equal(result, expected[row][first:end]), (row, first, end)
    for row, first, end in ((0, 19, 20), (1, 9, 10), (2, 0, 1)):
        alone = requests.run([(row, first, end)], replace(SMALL, num_programs=9), softcap=softcap)
        assert torch.equal(alone[0], expected[row][first:end]), row


@pytest.mark.parametrize("block_size", [16, 48, 5])
def test_a_shared_prefix_changes_nothing(block_size: int) -> None:
    """Decodes and short chunks over blocks in common, a prefill that has them too, and one that has others."""
    num_shared = 96 // block_size * block_size
    work = [(1, 100), (2, 130), (10, 110), (1, 99)]
    requests = Requests(work, (7, 1, 16), block_size=block_size, num_shared=num_shared)
    expected = requests.run_all()
    requests.check(expected)
    for num_programs in (1, 30):
        config = replace(SMALL, num_programs=num_programs, share_prefixes=True)
        for row, result in enumerate(requests.run_all(config)):
            assert torch.equal(result, expected[row]), (num_programs, row)


def test_queries_may_lie_apart() -> None:
    """As in a model: views of one projection of queries, keys and values."""
    requests = Requests([(9, 20), (1, 5)], (4, 2, 24))
    projection = torch.full((12, 8, 24), torch.nan)
    projection[:10, :4] = torch.cat(requests.queries)
    plan = plan_attention(requests.shape, np.array([0, 9, 10]), np.array([20, 5]), requests.tables, SMALL)
    result = paged_attention(projection[:, :4], *requests.caches, plan, 0.3)
    assert torch.equal(result[:10], torch.cat(requests.run_all()))


def test_what_does_not_fit_is_refused() -> None:
    shape = AttentionShape(1, 1, 16, 4, None)
    caches = torch.zeros(2, 3, 4, 1, 16)

    def attend(table: list[int], num_tokens: int, seq_len: int) -> None:
        plan = plan_attention(shape, np.array([0, num_tokens]), np.array([seq_len]), torch.tensor([table]), SMALL)
        paged_attention(torch.zeros(num_tokens, 1, 16), *caches, plan, 1.0)

    for table, num_tokens, seq_len in (([3], 1, 4), ([10**6], 1, 1), ([-1], 1, 1), ([1], 1, 5), ([1], 2, 1)):
        with pytest.raises(IndexError):
            attend(table, num_tokens, seq_len)


def test_a_batch_without_requests() -> None:
    shape = AttentionShape(4, 2, 16, 16, None)
    tables, cache = torch.zeros(0, 0, dtype=torch.int64), torch.zeros(2, 16, 2, 16)
    plan = plan_attention(shape, np.array([0]), np.array([], dtype=np.int64), tables, AttentionConfig())
    assert paged_attention(torch.zeros(0, 4, 16), cache, cache, plan, 1.0).shape == (0, 64)
