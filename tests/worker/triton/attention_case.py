"""Random requests over a paged cache, and float64 attention over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pelton.worker.kernels.ops import AttentionShape
from pelton.worker.kernels.triton.attention import AttentionPlan, paged_attention, plan_attention
from pelton.worker.kernels.triton.attention_config import AttentionConfig

# Several chunks of several tiles in contexts that the interpreter can bear.
SMALL = AttentionConfig(
    chunk_positions=32,
    tile_positions=16,
    narrow_rows=16,
    wide_rows=32,
    wide_from=1,
    num_programs=3,
    share_prefixes=False,
)


class Requests:
    """Requests of (new tokens, KV length) over shuffled blocks. Slots that none of them may read hold NaN."""

    def __init__(
        self,
        work: Sequence[tuple[int, int]],
        heads: tuple[int, int, int],
        *,
        dtype: torch.dtype = torch.float32,
        window: int | None = None,
        block_size: int = 16,
        num_shared: int = 0,
        config: AttentionConfig = SMALL,
    ) -> None:
        """The first `num_shared` positions, whole blocks, are the same for all."""
        torch.manual_seed(0)
        self.work, self.config = work, config
        num_heads, num_kv_heads, head_dim = heads
        self.shape = AttentionShape(num_heads, num_kv_heads, head_dim, block_size, window)
        self.queries = [torch.randn(num_tokens, num_heads, head_dim).to(dtype) for num_tokens, _ in work]
        width = max(-(-seq_len // block_size) for _, seq_len in work)
        num_blocks = 1 + width * len(work)
        self.caches = torch.full((2, num_blocks, block_size, num_kv_heads, head_dim), math.nan, dtype=dtype)
        ids = (torch.randperm(num_blocks - 1) + 1).view(len(work), width)
        ids[:, : num_shared // block_size] = ids[0, : num_shared // block_size]
        self.tables = torch.zeros_like(ids)
        self.slots: list[torch.Tensor] = []
        for row, (num_tokens, seq_len) in enumerate(work):
            first = 0 if window is None else max(0, seq_len - num_tokens - window + 1)
            positions = torch.arange(seq_len)
            self.slots.append(ids[row, positions // block_size] * block_size + positions % block_size)
            used = slice(first // block_size, (seq_len - 1) // block_size + 1)
            self.tables[row, used] = ids[row, used]
            own = self.slots[row][max(first, num_shared if row else 0) :]
            self.caches.flatten(1, 2)[:, own] = torch.randn(2, len(own), num_kv_heads, head_dim).to(dtype)

    def plan(self, parts: Sequence[tuple[int, int, int]], config: AttentionConfig | None = None) -> AttentionPlan:
        starts = np.cumsum([0, *(end - first for _, first, end in parts)])
        seq_lens = np.array([self.work[row][1] - self.work[row][0] + end for row, _, end in parts])
        tables = self.tables[[row for row, _, _ in parts]]
        return plan_attention(self.shape, starts, seq_lens, tables, config or self.config)

    def run(
        self,
        parts: Sequence[tuple[int, int, int]],
        config: AttentionConfig | None = None,
        **options: Any,
    ) -> list[torch.Tensor]:
        """One call for parts (request, first token, end); one result each."""
        query = torch.cat([self.queries[row][first:end] for row, first, end in parts])
        plan = self.plan(parts, config)
        result = paged_attention(query, *self.caches, plan, **{"scale": 0.3, **options})
        return list(result.split([end - first for _, first, end in parts]))

    def run_all(self, config: AttentionConfig | None = None, **options: Any) -> list[torch.Tensor]:
        return self.run([(row, 0, n) for row, (n, _) in enumerate(self.work)], config, **options)

    def expected(
        self, row: int, scale: float = 0.3, softcap: float | None = None, caches: torch.Tensor | None = None
    ) -> torch.Tensor:
        num_tokens, seq_len = self.work[row]
        shape = self.shape
        first = 0 if shape.sliding_window is None else max(0, seq_len - num_tokens - shape.sliding_window + 1)
        held = self.caches if caches is None else caches
        keys, values = held.flatten(1, 2)[:, self.slots[row][first:]].double()  # [L, K, D]
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

    def check(self, results: Sequence[torch.Tensor], tolerance: float = 5e-6, **options: Any) -> None:
        for row, result in enumerate(results):
            expected = self.expected(row, **options)
            assert result.shape == expected.shape
            assert (result.double() - expected).abs().max() <= tolerance * expected.abs().max(), self.work[row]
