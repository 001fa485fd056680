"""Paged attention of the native kernels: every instruction set and cache type, law 3 bit for bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from pelton.worker.kernels.ops import AttentionShape
from tests.worker.native import ISAS, OnTensors, on_tensors

pytestmark = pytest.mark.torch

# Of the largest result. The kernels for bfloat16 caches may round queries and probabilities as well.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 1.5e-2}
KV_DTYPES = list(TOLERANCES)
# Query tokens and KV length of each request.
MIXTURE = [(1, 200), (40, 40), (33, 150), (1, 1), (2, 130), (1, 64), (1, 65), (70, 128)]


@pytest.fixture(params=ISAS)
def kernels(request: pytest.FixtureRequest) -> OnTensors:
    torch.manual_seed(0)
    return on_tensors(request.param)


class Requests:
    """Requests over shuffled blocks. Slots that none of them may read hold NaN."""

    def __init__(
        self,
        work: Sequence[tuple[int, int]],
        heads: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        window: int | None = None,
        block_size: int = 16,
        num_shared: int = 0,
    ) -> None:
        """The first `num_shared` positions, whole blocks, are the same for all."""
        self.work = work
        num_heads, num_kv_heads, head_dim = heads
        self.shape = AttentionShape(num_heads, num_kv_heads, head_dim, block_size, window)
        width = max(-(-seq_len // block_size) for _, seq_len in work)
        num_blocks = 1 + width * len(work)
        self.queries = [torch.randn(num_tokens, num_heads, head_dim) for num_tokens, _ in work]
        self.caches = torch.full((2, num_blocks, block_size, num_kv_heads, head_dim), math.nan, dtype=dtype)
        ids = (torch.randperm(num_blocks - 1) + 1).view(len(work), width)
        ids[:, : num_shared // block_size] = ids[0, : num_shared // block_size]
        self.tables = torch.zeros_like(ids)
        self.slots: list[torch.Tensor] = []
        self._stored: dict[str, torch.Tensor] = {}
        self.written: list[torch.Tensor] = []
        for row, (num_tokens, seq_len) in enumerate(work):
            first = 0 if window is None else max(0, seq_len - num_tokens - window + 1)
            positions = torch.arange(seq_len)
            self.slots.append(ids[row, positions // block_size] * block_size + positions % block_size)
            used = slice(first // block_size, (seq_len - 1) // block_size + 1)
            self.tables[row, used] = ids[row, used]
            own = self.slots[row][max(first, num_shared if row else 0) :]
            self.caches.flatten(1, 2)[:, own] = torch.randn(2, len(own), num_kv_heads, head_dim).to(dtype)
            self.written.append(own)

    def stored_by(self, kernels: OnTensors) -> torch.Tensor:
        """The caches as `kernels` lays them out, whatever its number of threads; stored once."""
        isa = kernels.runtime.isa
        if isa not in self._stored:
            self._stored[isa] = self._store(kernels)
        return self._stored[isa]

    def _store(self, kernels: OnTensors) -> torch.Tensor:
        caches = torch.full_like(self.caches, math.nan)
        slots = torch.cat(self.written)
        keys, values = self.caches.flatten(1, 2)[:, slots].float()
        nothing = torch.empty(len(slots), 0)
        kernels.rotate_and_store(torch.empty_like(keys), keys, values, nothing, nothing, *caches, slots)
        return caches

    def run(self, kernels: OnTensors, parts: Sequence[tuple[int, int, int]], **options: Any) -> list[torch.Tensor]:
        """One call for parts (request, first token, end); one result each."""
        query = torch.cat([self.queries[row][first:end] for row, first, end in parts])
        starts, seq_lens = [0], []
        for row, first, end in parts:
            starts.append(starts[-1] + end - first)
            num_tokens, seq_len = self.work[row]
            seq_lens.append(seq_len - num_tokens + end)
        plan = kernels.plan_attention(self.shape, starts, seq_lens, self.tables[[row for row, _, _ in parts]])
        result = kernels.paged_attention(query, *self.stored_by(kernels), plan, **{"scale": 0.3, **options})
        return list(result.split([end - first for _, first, end in parts]))

    def run_all(self, kernels: OnTensors, **options: Any) -> list[torch.Tensor]:
        return self.run(kernels, [(row, 0, n) for row, (n, _) in enumerate(self.work)], **options)

    def expected(self, row: int, scale: float = 0.3, softcap: float | None = None) -> torch.Tensor:
        num_tokens, seq_len = self.work[row]
        shape = self.shape
        first = 0 if shape.sliding_window is None else max(0, seq_len - num_tokens - shape.sliding_window + 1)
        keys, values = self.caches.flatten(1, 2)[:, self.slots[row][first:]].double()  # [L, K, D]
        query = self.queries[row].double().view(num_tokens, shape.num_kv_heads, -1, shape.head_dim)
        scores = torch.einsum("tkgd,lkd->tkgl", query, keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(seq_len - num_tokens, seq_len)[:, None] - torch.arange(first, seq_len)
        hidden = distance < 0
        if shape.sliding_window is not None:
            hidden |= distance >= shape.sliding_window
        scores = scores.masked_fill(hidden[:, None, None], -math.inf)
        return torch.einsum("tkgl,lkd->tkgd", scores.softmax(-1), values).flatten(1)

    def check(self, results: Sequence[torch.Tensor], **options: Any) -> None:
        tolerance = TOLERANCES[self.caches.dtype]
        for row, result in enumerate(results):
            expected = self.expected(row, **options)
            assert result.shape == expected.shape
            assert (result.double() - expected).abs().max() <= tolerance * expected.abs().max(), self.work[row]

    def check_alone(self, kernels: OnTensors, results: Sequence[torch.Tensor]) -> None:
        """Each request gives the same bits by itself, on one thread and on three."""
        for num_threads in (1, 3):
            threaded = on_tensors(kernels.runtime.isa, num_threads)
            for row, (num_tokens, _) in enumerate(self.work):
                assert torch.equal(self.run(threaded, [(row, 0, num_tokens)])[0], results[row])


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("head_dim", [1, 2, 17, 33, 40, 63, 64, 80, 128, 256])
def test_head_sizes(kernels: OnTensors, head_dim: int, dtype: torch.dtype) -> None:
    requests = Requests(MIXTURE, (4, 2, head_dim), dtype)
    scale = head_dim**-0.5
    requests.check(requests.run_all(kernels, scale=scale), scale=scale)


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("block_size", [1, 5, 16, 48, 300])
@pytest.mark.parametrize("heads", [(3, 3, 16), (4, 2, 96), (14, 2, 64), (18, 2, 8), (5, 1, 33)])
def test_groups_and_blocks(
    kernels: OnTensors, heads: tuple[int, int, int], block_size: int, dtype: torch.dtype
) -> None:
    requests = Requests(MIXTURE, heads, dtype, block_size=block_size)
    requests.check(requests.run_all(kernels))


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [1, 2, 20, 64, 100, 1000])
@pytest.mark.parametrize("head_dim", [40, 64])
def test_sliding_windows(kernels: OnTensors, head_dim: int, window: int, dtype: torch.dtype) -> None:
    requests = Requests([*MIXTURE, (50, 333)], (4, 2, head_dim), dtype, window=window)
    requests.check(requests.run_all(kernels))


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_softcaps(kernels: OnTensors, softcap: float, dtype: torch.dtype) -> None:
    requests = Requests(MIXTURE, (4, 2, 32), dtype, window=90)
    requests.check(requests.run_all(kernels, scale=1.0, softcap=softcap), scale=1.0, softcap=softcap)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_scores_may_be_large(kernels: OnTensors, dtype: torch.dtype) -> None:
    """Maxima that rise tile after tile, and exponents out of the range of float32."""
    requests = Requests([(3, 200), (20, 300)], (2, 1, 32), torch.float32)
    requests.caches[0] *= torch.linspace(1, 30, 300).repeat(2)[: requests.caches.shape[1]].view(-1, 1, 1, 1)
    requests.caches = requests.caches.to(dtype)
    requests.queries = [query.bfloat16().float() for query in requests.queries]  # exact in either product
    results = requests.run_all(kernels, scale=2.0)
    for row, result in enumerate(results):
        assert result.isfinite().all()
        assert (result - requests.expected(row, 2.0)).abs().max() < (1e-3 if dtype is torch.float32 else 0.05)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_long_contexts(kernels: OnTensors, dtype: torch.dtype) -> None:
    requests = Requests([(1, 600), (37, 600), (100, 530), (1, 3000)], (2, 1, 32), dtype)
    requests.check(requests.run_all(kernels))


@pytest.mark.parametrize(
    ("heads", "window", "softcap"),
    [((4, 2, 40), None, None), ((14, 2, 64), 70, None), ((3, 3, 33), None, 5.0), ((4, 1, 256), 33, None)],
)
@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("block_size", [7, 16])
def test_a_tokens_result_depends_on_nothing_else(
    kernels: OnTensors,
    block_size: int,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    window: int | None,
    softcap: float | None,
) -> None:
    """Law 3: chunks of any size, any company, any number of threads, bit for bit."""
    work = [(150, 150), (90, 370), (1, 299)]
    requests = Requests(work, heads, dtype, window=window, block_size=block_size)
    expected = requests.run_all(kernels, softcap=softcap)
    for chunk in (1, 3, 16, 77):
        for row, (num_tokens, _) in enumerate(work):
            bounds = [*range(0, num_tokens, chunk), num_tokens]
            pieces = [requests.run(kernels, [(row, *pair)], softcap=softcap)[0] for pair in pairwise(bounds)]
            assert torch.equal(torch.cat(pieces), expected[row]), chunk
    # Pieces of all of them in one call, out of order.
    parts = [(1, 40, 73), (0, 149, 150), (2, 0, 1), (0, 3, 20), (1, 0, 40)]
    for num_threads in (1, 2, 3):
        results = requests.run(on_tensors(kernels.runtime.isa, num_threads), parts, softcap=softcap)
        for (row, first, end), result in zip(parts, results, strict=True):
            assert torch.equal(result, expected[row][first:end]), num_threads


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("heads", [(14, 2, 64), (4, 1, 32), (16, 1, 32), (3, 3, 96)])
def test_a_shared_prefix_changes_nothing(kernels: OnTensors, heads: tuple[int, int, int], block_size: int) -> None:
    """Decodes over blocks in common, far more of them than are read together, among others. The two long ones have
    whole chunks of their own after those in common."""
    work = [(20, 560), *[(1 + row % 2, 540 + 3 * row) for row in range(40)], (1, 528), (1, 300), (1, 1100), (1, 1100)]
    requests = Requests(work, heads, torch.bfloat16, block_size=block_size, num_shared=528)
    results = requests.run_all(kernels)
    requests.check(results)
    requests.check_alone(kernels, results)


@pytest.mark.parametrize("window", [None, 300])
def test_many_decodes_by_themselves(kernels: OnTensors, window: int | None) -> None:
    """So many that each is attended as a whole where it shares nothing; alone it is cut into chunks of positions."""
    work = [(1 + row % 2, 257 + 17 * row) for row in range(48)]
    requests = Requests(work, (14, 2, 64), torch.bfloat16, window=window)
    results = requests.run_all(kernels)
    requests.check(results)
    requests.check_alone(kernels, results)


def test_a_shared_prefix_is_read_once_for_many(kernels: OnTensors) -> None:
    shape, num_requests = AttentionShape(14, 2, 64, 16, None), 40

    def num_read(num_shared_blocks: int) -> int:
        tables = torch.arange(1, 1 + 80 * num_requests).view(num_requests, 80)
        tables[:, :num_shared_blocks] = tables[0, :num_shared_blocks]
        starts = list(range(num_requests + 1))
        plan = kernels.plan_attention(shape, starts, [1100] * num_requests, tables)
        return int(plan.native(True).num_positions_read)

    by_columns = kernels.runtime.isa in ("amx", "avx512")  # 32 requests at a time; by rows each reads its own
    assert num_read(0) == 1100 * num_requests
    assert num_read(64) == (76 * num_requests + 2 * 1024 if by_columns else 1100 * num_requests)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_queries_may_lie_apart(kernels: OnTensors, dtype: torch.dtype) -> None:
    """As in a model: views of one projection of queries, keys and values."""
    requests = Requests([(9, 20), (1, 5)], (4, 2, 24), dtype)
    expected = requests.run_all(kernels)
    projection = torch.full((10, 8, 24), math.nan)
    projection[:, :4] = torch.cat(requests.queries)
    plan = kernels.plan_attention(requests.shape, [0, 9, 10], [20, 5], requests.tables)
    result = kernels.paged_attention(projection[:, :4], *requests.caches, plan, 0.3)
    assert torch.equal(result, torch.cat(expected))


def test_a_batch_without_requests(kernels: OnTensors) -> None:
    plan = kernels.plan_attention(AttentionShape(4, 2, 8, 16, None), [0], [], torch.zeros(0, 0, dtype=torch.int64))
    cache = torch.zeros(2, 16, 2, 8)
    assert kernels.paged_attention(torch.zeros(0, 4, 8), cache, cache, plan, 1.0).shape == (0, 32)
