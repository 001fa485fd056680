"""Attention of decode steps and of prompts, at every context and window. Legend as in ops.py."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pelton.bench.roofline import KernelFigure, KernelWork, make_figure
from pelton.worker.kernels.cpu import pelton_cpu
from pelton.worker.kernels.cpu.arrays import address, native_shape
from pelton.worker.kernels.cpu.measure.setup import BLOCK_SIZE, Setup, repeats
from pelton.worker.kernels.ops import AttentionShape

_CYCLE_BYTES = 512 << 20  # keys and values that calls go through in turn
_EVICT_BYTES = 64 << 20


class AttentionBench:
    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._wake_rows = setup.floats(8, 32)
        self._other_bytes = np.ones(_EVICT_BYTES // 8, np.int64)

    def figures(self) -> Iterator[KernelFigure]:
        """Decode and prefill at every context, for each kind of window that the model has."""
        for window in dict.fromkeys(group.sliding_window for group in self._setup.spec.kv_groups):
            for context in self._setup.plan.contexts:
                for num_requests in self._setup.plan.decode_requests:
                    yield self._attend("attention decode", num_requests, 1, context, window)
                num_tokens = min(self._setup.plan.prefill_tokens, context)
                yield self._attend("attention prefill", 1, num_tokens, context, window)

    def _attend(self, name: str, num_requests: int, num_tokens: int, context: int, window: int | None) -> KernelFigure:
        """`num_requests` with `num_tokens` new tokens each, the last of them at position `context` - 1."""
        spec = self._setup.spec
        num_rows = num_requests * num_tokens
        num_columns = -(-context // BLOCK_SIZE)
        num_blocks = num_requests * num_columns
        tables = self._setup.rng.permutation(num_blocks).reshape(num_requests, num_columns)
        starts = np.arange(num_requests + 1, dtype=np.int64) * num_tokens
        seq_lens = np.full(num_requests, context, np.int64)
        shape = AttentionShape(spec.num_heads, spec.num_kv_heads, spec.head_dim, BLOCK_SIZE, window)
        plan = pelton_cpu.AttentionPlan(
            self._setup.runtime,
            *native_shape(shape, True),
            address(starts),
            address(seq_lens),
            num_requests,
            address(tables),
            num_columns,
        )
        values_per_cache = num_blocks * BLOCK_SIZE * spec.num_kv_heads * spec.head_dim
        num_caches = min(spec.num_layers, max(1, _CYCLE_BYTES // (4 * values_per_cache)))
        caches = self._bf16(num_caches, 2, values_per_cache)
        width = spec.num_heads * spec.head_dim
        query, out = self._setup.floats(num_rows, width), np.empty((num_rows, width), np.float32)
        scale = spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
        is_small = caches.nbytes < _EVICT_BYTES
        times_s = []
        for index in repeats(self._setup.plan.budget_s):
            keys, values = caches[index % num_caches]
            if is_small:
                self._evict()
            start_s = time.perf_counter()
            self._setup.runtime.attend(
                plan,
                num_rows,
                num_blocks,
                scale,
                spec.attention_softcap or 0.0,
                address(query),
                width,
                address(keys),
                address(values),
                address(out),
            )
            times_s.append(time.perf_counter() - start_s)
        seen = np.minimum(np.arange(context - num_tokens, context) + 1, window or context)
        read = min(context, (window or context) + num_tokens - 1)
        detail = f"context {context}" + (f", window {window}" if window else "")
        work = KernelWork(
            kernel=name,
            detail=detail,
            num_rows=num_rows,
            num_ops=4.0 * num_requests * width * float(seen.sum()),
            num_bytes=4.0 * num_requests * read * spec.num_kv_heads * spec.head_dim,
            memory=self._setup.dram,
            arithmetic=self._setup.attention,
        )
        return make_figure(work, times_s)

    def _bf16(self, *shape: int) -> npt.NDArray[np.uint16]:
        """Normal numbers; one million of them over and over."""
        some = (self._setup.floats(min(1 << 20, int(np.prod(shape)))).view(np.uint32) >> 16).astype(np.uint16)
        return np.resize(some, shape)

    def _evict(self) -> None:
        """Let other bytes take the caches, then wake the threads that fell asleep meanwhile."""
        self._other_bytes.sum()
        rows = self._wake_rows
        for _ in range(4):
            self._setup.runtime.rms_norm(
                rows.ctypes.data, 0, rows.ctypes.data, len(rows), rows.shape[1], 1e-6, rows.ctypes.data
            )
