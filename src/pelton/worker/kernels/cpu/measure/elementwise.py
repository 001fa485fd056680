"""What lies between products and attention: norms, activations, rotary, sampling. Legend as in ops.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np

from pelton.bench.roofline import KernelFigure, KernelWork, make_figure
from pelton.worker.kernels.cpu import pelton_cpu
from pelton.worker.kernels.cpu.measure.setup import BLOCK_SIZE, MAX_LOGITS_ROWS, Setup, repeats


class ElementwiseBench:
    """On rows that the caches hold, as a step has them."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def figures(self, num_rows: int) -> Iterator[KernelFigure]:
        spec, runtime = self._setup.spec, self._setup.runtime
        hidden, residual = self._setup.floats(2, num_rows, spec.hidden_size)
        weight = np.ones(spec.hidden_size, np.float32)
        out = np.empty((num_rows, max(spec.hidden_size, spec.intermediate_size)), np.float32)
        addresses = hidden.ctypes.data, residual.ctypes.data, weight.ctypes.data
        yield self._repeat(
            "add_rms_norm",
            num_rows,
            16 * spec.hidden_size,
            lambda: runtime.rms_norm(*addresses, num_rows, spec.hidden_size, spec.rms_norm_eps, out.ctypes.data),
        )
        gate_up = self._setup.floats(num_rows, 2 * spec.intermediate_size)
        yield self._repeat(
            "gated activation",
            num_rows,
            12 * spec.intermediate_size,
            lambda: runtime.gated(
                spec.hidden_act != "silu", gate_up.ctypes.data, num_rows, spec.intermediate_size, out.ctypes.data
            ),
        )
        yield self._rotate_and_store(num_rows)
        if num_rows <= MAX_LOGITS_ROWS:
            yield self._sample(num_rows)

    def _sample(self, num_rows: int) -> KernelFigure:
        """Greedy, which reads the logits once."""
        vocab_size = self._setup.spec.vocab_size
        logits = self._setup.floats(num_rows, vocab_size)
        rows = [
            pelton_cpu.SamplingRow(
                vocab_size,
                temperature=0.0,
                filters=(0, 1.0, 0.0),
                seed=0,
                penalties=(1.0, 0.0, 0.0),
                bias=[],
                allowed=None,
                banned=[],
                stops=(0, []),
                num_logprobs=-1,
            )
            for _ in range(num_rows)
        ]
        positions = [0] * num_rows
        sampler = pelton_cpu.Sampler(self._setup.runtime, vocab_size)
        return self._repeat(
            "sampling, greedy",
            num_rows,
            4 * vocab_size,
            lambda: sampler.sample(logits.ctypes.data, rows, positions, []),
        )

    def _rotate_and_store(self, num_rows: int) -> KernelFigure:
        spec = self._setup.spec
        query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        width, half = query_size + 2 * kv_size, spec.rope.rotary_dim // 2
        qkv = self._setup.floats(num_rows, width)
        angles = self._setup.floats(num_rows, half)
        cos, sin = np.cos(angles), np.sin(angles)
        num_slots = -(-num_rows // BLOCK_SIZE) * BLOCK_SIZE
        slots = self._setup.rng.permutation(num_slots)[:num_rows]
        caches = np.zeros((2, num_slots, kv_size), np.uint16)
        address = qkv.ctypes.data
        heads = spec.num_heads, spec.num_kv_heads, spec.head_dim, BLOCK_SIZE, True
        tokens = num_rows, slots.ctypes.data, cos.ctypes.data, sin.ctypes.data, half
        rows = address, width, address + 4 * query_size, width, address + 4 * (query_size + kv_size), width
        keys, values = (cache.ctypes.data for cache in caches)
        return self._repeat(
            "rotary and store",
            num_rows,
            8 * query_size + 16 * kv_size + 8 * half,
            lambda: self._setup.runtime.rotate_and_store(heads, tokens, rows, keys, values, num_slots),
        )

    def _repeat(self, name: str, num_rows: int, bytes_per_row: int, call: Callable[[], object]) -> KernelFigure:
        times_s = []
        for _ in repeats(self._setup.plan.budget_s / 8):
            start_s = time.perf_counter()
            call()
            times_s.append(time.perf_counter() - start_s)
        num_bytes = num_rows * bytes_per_row
        work = KernelWork(
            kernel=name,
            detail="",
            num_rows=num_rows,
            num_ops=0.0,
            num_bytes=float(num_bytes),
            memory=self._setup.ceilings.memory_of(num_bytes),
        )
        return make_figure(work, times_s)
