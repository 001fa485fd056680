"""Paged attention on a GPU beside its limits: copy bandwidth for decodes, the bfloat16 product for prefills.

    python -m benchmarks.gpu.attention         needs a GPU; run(device) is what `make gpu-check` calls

Bytes: keys and values of every context once (where they are shared once for all), queries and results. Operations:
4 N D for each pair of a token and a position it sees. Caches are far larger than the L2 cache or rotate through
layers that are; contents are random; times are the median of device events over replays of a captured launch.
`error` is that of a few rows against float64, as a norm. `same_bits` is law 3: the same tokens as a prefill, as
decodes in a full batch, and as decodes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
import triton.testing
from benchmarks.gpu.parts import in_parts

from pelton.worker.kernels.ops import AttentionShape
from pelton.worker.kernels.triton.attention import AttentionPlan, paged_attention, plan_attention
from pelton.worker.kernels.triton.attention_config import AttentionConfig, choose_config
from pelton.worker.kernels.triton.packed_kv import rotate_and_store_packed
from pelton.worker.kv_format import KV_FORMATS, SCALE_BYTES

_BLOCK_SIZE = 16
_CACHE_BYTES = 200 << 20  # of the sets that a measurement rotates through: four times an H100's L2
# Norms of errors beside those of what is right: of packed caches what rounding random numbers costs, twice over.
MOST_ERROR = {"bfloat16": 1e-2, "fp8": 6e-2, "int8": 2e-2, "int4": 2.5e-1}
LLAMA = (32, 8, 128)  # heads, key-value heads, head size of Llama 3.1 8B
QWEN = (14, 2, 64)
GEMMA = (16, 8, 256)


@dataclass(frozen=True, slots=True)
class Case:
    """Requests of (new tokens, KV length)."""

    name: str
    work: Sequence[tuple[int, int]]
    heads: tuple[int, int, int] = LLAMA
    kv_format: str = "bfloat16"
    window: int | None = None
    num_shared: int = 0  # first positions that all have in common
    batch_invariant: bool = True


CASES = (
    Case("decode 256 x 2K", [(1, 2048)] * 256),
    Case("decode 256 x 2K, 16 rows", [(1, 2048)] * 256, batch_invariant=False),
    Case("decode 64 x 2K", [(1, 2048)] * 64),
    Case("decode 8 x 8K", [(1, 8192)] * 8),
    Case("decode 1 x 2K", [(1, 2048)]),
    Case("decode 1 x 128K", [(1, 131_072)]),
    Case("decode, lengths 100 to 16K", [(1, int(length)) for length in np.geomspace(100, 16_384, 128)]),
    Case("decode 64 x 2K, 4 tokens each", [(4, 2048)] * 64),
    Case("decode 256 x 2K, 1,792 shared", [(1, 2048)] * 256, num_shared=1792),
    Case("decode 256 x 2K, fp8", [(1, 2048)] * 256, kv_format="fp8"),
    Case("decode 256 x 2K, int8", [(1, 2048)] * 256, kv_format="int8"),
    Case("decode 256 x 2K, int4", [(1, 2048)] * 256, kv_format="int4"),
    Case("decode 64 x 8K, window 4K, heads of 256", [(1, 8192)] * 64, GEMMA, window=4096),
    Case("decode 256 x 2K, heads of 64", [(1, 2048)] * 256, QWEN),
    Case("prefill 8,192", [(8192, 8192)]),
    Case("prefill 4 x 2,048", [(2048, 2048)] * 4),
    Case("prefill 1,024 after 31K", [(1024, 32_768)]),
    Case("prefill 8,192, heads of 256", [(8192, 8192)], GEMMA),
    Case("prefill 8,192, fp8", [(8192, 8192)], kv_format="fp8"),
    Case("mixed: 512 after 1,536 and 64 x 2K", [(512, 2048), *[(1, 2048)] * 64]),
)


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """A result; `share` is of `limit_us`, the longer of the two times that the device's own rates leave."""

    name: str
    time_us: float
    gb_s: float
    tflop_s: float
    limit_us: float
    share: float
    error: float
    same_bits: bool | None  # None: not looked at
    most_error: float


def run(device: torch.device) -> Iterator[dict[str, object]]:
    """All rows."""
    copy_gb_s, product_tflop_s = measure_copy(device), measure_product(device)
    return in_parts((case.name, partial(_rows, case, copy_gb_s, product_tflop_s, device)) for case in CASES)


def _rows(case: Case, copy_gb_s: float, product_tflop_s: float, device: torch.device) -> list[dict[str, object]]:
    return [asdict(measure(case, copy_gb_s, product_tflop_s, device))]


def measure_copy(device: torch.device) -> float:
    """GB/s of a large copy on the device, bytes read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_us([lambda: target.copy_(source)]) / 1e3


def measure_product(device: torch.device) -> float:
    """TFLOP/s of a large product in bfloat16."""
    size = 8192
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / _median_us([lambda: torch.mm(a, b)]) / 1e6


def measure(case: Case, copy_gb_s: float, product_tflop_s: float, device: torch.device) -> AttentionRow:
    batch = _Batch(case, device)
    time_us = _median_us([lambda layer=layer: batch.attend(layer) for layer in range(len(batch.caches))])
    num_bytes, num_flops = count(case)
    limit_us = max(num_bytes / copy_gb_s / 1e3, num_flops / product_tflop_s / 1e6)
    return AttentionRow(
        case.name,
        time_us,
        num_bytes / time_us / 1e3,
        num_flops / time_us / 1e6,
        limit_us,
        limit_us / time_us,
        batch.error(),
        batch.has_same_bits() if case.batch_invariant else None,
        MOST_ERROR[case.kv_format],
    )


def count(case: Case) -> tuple[int, int]:
    """(bytes, operations) that the case cannot do without."""
    num_heads, num_kv_heads, head_dim = case.heads
    kv_format = KV_FORMATS[case.kv_format]
    token_bytes = 2 * num_kv_heads * head_dim * kv_format.element_bits // 8
    if kv_format.is_packed:
        token_bytes += 2 * num_kv_heads * SCALE_BYTES
    num_positions = num_pairs = num_queries = 0
    for num_tokens, seq_len in case.work:
        seen = [position + 1 for position in range(seq_len - num_tokens, seq_len)]
        if case.window is not None:
            seen = [min(number, case.window) for number in seen]
        num_pairs += sum(seen)
        num_queries += num_tokens
        num_positions += min(seq_len, num_tokens - 1 + seen[0]) - case.num_shared
    num_positions += case.num_shared
    num_bytes = num_positions * token_bytes + num_queries * num_heads * head_dim * 4
    return num_bytes, 4 * num_pairs * num_heads * head_dim


class _Batch:
    """A case with random caches, of as many layers as the L2 cache does not hold."""

    def __init__(self, case: Case, device: torch.device) -> None:
        num_heads, num_kv_heads, head_dim = case.heads
        self._case, self._device = case, device
        self._shape = AttentionShape(num_heads, num_kv_heads, head_dim, _BLOCK_SIZE, case.window)
        self._config = choose_config(self._shape, batch_invariant=case.batch_invariant)
        generator = torch.Generator().manual_seed(0)
        width = max(-(-seq_len // _BLOCK_SIZE) for _, seq_len in case.work)
        num_blocks = 1 + width * len(case.work)
        order = torch.randperm(num_blocks - 1, generator=generator) + 1
        self._tables = order.view(len(case.work), width)
        self._tables[:, : case.num_shared // _BLOCK_SIZE] = self._tables[0, : case.num_shared // _BLOCK_SIZE]
        self._starts = np.cumsum([0, *(num_tokens for num_tokens, _ in case.work)])
        self._lens = np.array([seq_len for _, seq_len in case.work])
        self._scale = head_dim**-0.5
        self._format = KV_FORMATS[case.kv_format]
        block_shape = self._format.block_shape(_BLOCK_SIZE, num_kv_heads, head_dim)
        element_bytes = getattr(torch, self._format.array_dtype).itemsize
        num_layers = -(-_CACHE_BYTES // (2 * num_blocks * math.prod(block_shape) * element_bytes))
        self._stored: list[torch.Tensor] = []  # keys and values [slots, K, D] that packed caches were made of
        self.caches = [self._random_caches(num_blocks, block_shape) for _ in range(num_layers)]
        # As they are, and as packed caches want them.
        self._plain_query = torch.randn(int(self._starts[-1]), num_heads, head_dim, device=device).bfloat16()
        self._query = self._turned(self._plain_query) if self._format.is_packed else self._plain_query
        self._plan = self._make_plan(np.arange(len(case.work)), self._config)

    def _random_caches(self, num_blocks: int, block_shape: tuple[int, ...]) -> list[torch.Tensor]:
        """Keys and values. Packed ones go through the kernel that writes them."""
        dtype = getattr(torch, self._format.array_dtype)
        if not self._format.is_packed:
            return [torch.randn((num_blocks, *block_shape), device=self._device).to(dtype) for _ in range(2)]
        caches = [
            torch.zeros((num_blocks, *block_shape), dtype=torch.uint8, device=self._device).view(dtype)
            for _ in range(2)
        ]
        num_slots, step = num_blocks * _BLOCK_SIZE, 65_536
        parts: list[torch.Tensor] = []
        nothing = torch.zeros(step, 0, device=self._device)
        for first in range(0, num_slots, step):
            slots = torch.arange(first, min(first + step, num_slots), device=self._device)
            heads = torch.randn(len(slots), 3, self._shape.num_kv_heads, self._shape.head_dim, device=self._device)
            query, key, value = heads.bfloat16().unbind(1)
            rotate_and_store_packed(query, key, value, nothing[: len(slots)], nothing[: len(slots)], *caches, slots)
            parts.append(heads[:, 1:].bfloat16())
        if not self._stored:
            self._stored = list(torch.cat(parts).unbind(1))
        return caches

    def _turned(self, query: torch.Tensor) -> torch.Tensor:
        nothing = torch.zeros(len(query), 0, device=self._device)
        nowhere = torch.full((len(query),), -1, dtype=torch.int32, device=self._device)
        unused = query[:, : self._shape.num_kv_heads]
        return rotate_and_store_packed(query, unused, unused, nothing, nothing, *self.caches[0], nowhere)

    def _make_plan(self, rows: np.ndarray, config: AttentionConfig) -> AttentionPlan:
        lengths = np.diff(self._starts)[rows]
        tables = self._tables[rows].to(self._device)
        return plan_attention(self._shape, np.cumsum([0, *lengths]), self._lens[rows], tables, config)

    def attend(self, layer: int) -> torch.Tensor:
        keys, values = self.caches[layer]
        return paged_attention(self._query, keys, values, self._plan, self._scale)

    def error(self) -> float:
        """Of the last token of a few requests; of packed caches beside what was stored in them."""
        held = self._stored or [cache.flatten(0, 1) for cache in self.caches[0]]
        result = self.attend(0).double()
        wrong = right = 0.0
        for row in range(0, len(self._lens), max(1, len(self._lens) // 4)):
            token, seq_len = int(self._starts[row + 1]) - 1, int(self._lens[row])
            first = 0 if self._case.window is None else max(0, seq_len - self._case.window)
            positions = torch.arange(first, seq_len)
            slots = self._tables[row, positions // _BLOCK_SIZE] * _BLOCK_SIZE + positions % _BLOCK_SIZE
            keys, values = (each[slots.to(self._device)].double() for each in held)
            query = self._plain_query[token].double().view(self._shape.num_kv_heads, -1, self._shape.head_dim)
            weights = (torch.einsum("kgd,lkd->kgl", query, keys) * self._scale).softmax(-1)
            expected = torch.einsum("kgl,lkd->kgd", weights, values).flatten()
            wrong += float((result[token] - expected).square().sum())
            right += float(expected.square().sum())
        return math.sqrt(wrong / right)

    def has_same_bits(self) -> bool:
        """The last tokens of the first request: as they are, alone, in other pieces, and one after another."""
        keys, values = self.caches[0]
        together = self.attend(0)
        num_tokens, seq_len = self._case.work[0]
        alone = self._make_plan(np.array([0]), replace(self._config, num_programs=1 << 20))
        same = torch.equal(
            paged_attention(self._query[:num_tokens], keys, values, alone, self._scale), together[:num_tokens]
        )
        table = self._tables[:1].to(self._device)
        for token in range(max(0, num_tokens - 3), num_tokens):
            lens = np.array([seq_len - num_tokens + token + 1])
            plan = plan_attention(self._shape, np.array([0, 1]), lens, table, self._config)
            one = paged_attention(self._query[token : token + 1], keys, values, plan, self._scale)
            same = same and torch.equal(one, together[token : token + 1])
        return same


def _median_us(launches: Sequence[Callable[[], object]]) -> float:
    """Of one of `launches`, which are captured one after another and replayed."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    median_ms = triton.testing.do_bench(graph.replay, warmup=50, rep=200, return_mode="median")
    return float(median_ms) * 1e3 / len(launches)


def show(rows: Sequence[dict[str, object]]) -> str:
    lines = [f"{'case':<40} {'us':>9} {'GB/s':>6} {'TFLOP/s':>8} {'floor us':>9} {'share':>6} {'error':>8} same bits"]
    lines += [
        f"{row['name']:<40} {row['time_us']:>9.1f} {row['gb_s']:>6.0f} {row['tflop_s']:>8.1f} {row['limit_us']:>9.1f} "
        f"{row['share']:>6.2f} {row['error']:>8.1e} {row['same_bits']}"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(device))
    print(show(list(run(device))))


if __name__ == "__main__":
    main()
