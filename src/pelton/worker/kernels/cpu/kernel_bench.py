"""What each native kernel reaches on the shapes of a real model, beside what the machine gives at most.

Products are measured as a step runs them: layer after layer, the output head at the end, so that the weights of
a layer have left the caches when their turn comes again. Nothing here needs torch.

Legend as in ops.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pelton.bench.roofline import (
    Ceiling,
    Ceilings,
    KernelBenchPlan,
    KernelFigure,
    KernelReport,
    KernelWork,
    make_figure,
)
from pelton.core.errors import ConfigError
from pelton.core.model_spec import ModelSpec
from pelton.weights.tensors import ModelFiles, WeightTensor
from pelton.worker.kernels.cpu import pelton_cpu
from pelton.worker.kernels.cpu.packed_weights import PackedWeights, is_packable

# The arithmetic that an instruction set's kernels are built on: names of native/ceilings_x86.cpp.
_PRODUCT_CEILINGS = {
    "amx": ("bf16_amx",),
    "avx512": ("int8_avx512_vnni",),
    "avx_vnni": ("int8_avx_vnni",),
    "avx2": ("int8_avx2",),
}
_ATTENTION_CEILINGS = {
    "amx": ("bf16_amx",),
    "avx512": ("bf16_avx512", "fp32_avx512"),
    "avx_vnni": ("fp32_avx2",),
    "avx2": ("fp32_avx2",),
}

MAX_LOGITS_ROWS = 64  # as the model runner has them at once
_BLOCK_SIZE = 16  # positions
_MIN_CALLS, _MAX_CALLS = 4, 200
_CYCLE_BYTES = 512 << 20  # keys and values that calls go through in turn
_EVICT_BYTES = 64 << 20

_LAYER_MATRICES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}

Floats = npt.NDArray[np.float32]


@dataclass(slots=True)
class _Matrix:
    """One product of the model, with its weight in every layer."""

    name: str
    num_inputs: int
    weights: list[pelton_cpu.LinearWeight] = field(default_factory=list)
    formats: dict[str, None] = field(default_factory=dict)  # an ordered set


def make_runtime(isa: str | None, num_threads: int) -> pelton_cpu.Runtime:
    """Raises `ConfigError` for an instruction set that does not run here."""
    try:
        return pelton_cpu.Runtime(isa, num_threads, [])
    except ValueError as error:
        raise ConfigError(f"isa {isa!r}: {error}") from error


def measure_ceilings(num_threads: int, num_free_bytes: int) -> Ceilings:
    """Some 4 s. `num_free_bytes` bounds the memory that is read, which the ceiling of "dram" then flatters."""
    dram_bytes = min(pelton_cpu.dram_buffer_bytes(), num_free_bytes // 4)
    measured = pelton_cpu.measure_ceilings(num_threads, dram_bytes)
    return Ceilings(
        num_threads=num_threads,
        dram_bytes=dram_bytes,
        l2_bytes=pelton_cpu.l2_cache_bytes(),
        l3_bytes=pelton_cpu.l3_cache_bytes(),
        ceilings=tuple(Ceiling(name=name, one_thread=one, all_threads=all_) for name, one, all_ in measured),
    )


def measure_kernels(
    files: ModelFiles,
    runtime: pelton_cpu.Runtime,
    ceilings: Ceilings,
    plan: KernelBenchPlan,
    on_progress: Callable[[str], None],
) -> KernelReport:
    """Every kernel on the shapes and weights of `files`."""
    bench = _KernelBench(files.spec, runtime, ceilings, plan)
    on_progress("packing weights")
    matrices, skipped = load_matrices(files, runtime)
    figures: list[KernelFigure] = []
    for num_rows in plan.rows:
        on_progress(f"products, {num_rows} rows")
        figures += bench.products(matrices, num_rows)
    del matrices
    for figure in bench.attention():
        on_progress(figure.work.kernel)
        figures.append(figure)
    for num_rows in plan.rows:
        on_progress(f"elementwise kernels, {num_rows} rows")
        figures += bench.elementwise(num_rows)
    names = list(dict.fromkeys(["qkv", "o", "gate_up", "down", *(figure.work.kernel for figure in figures)]))
    figures.sort(key=lambda figure: names.index(figure.work.kernel))
    return KernelReport(
        isa=runtime.isa,
        num_threads=runtime.num_threads,
        ceilings=ceilings,
        figures=tuple(figures),
        skipped=tuple(skipped),
    )


def load_matrices(files: ModelFiles, runtime: pelton_cpu.Runtime) -> tuple[list[_Matrix], list[str]]:
    """The model's products in the order of a step, and those that have no native kernel."""
    spec = files.spec
    head = "model.embed_tokens" if spec.tie_word_embeddings else "lm_head"
    matrices: list[_Matrix] = []
    skipped: list[str] = []
    for kernel, names in {**_LAYER_MATRICES, "lm_head": (head,)}.items():
        prefixes = [""] if kernel == "lm_head" else [f"model.layers.{i}." for i in range(spec.num_layers)]
        layers = [[files.tensor(f"{prefix}{name}.weight") for name in names] for prefix in prefixes]
        matrix = _Matrix(kernel, layers[0][0].shape[1])
        for tensors in layers:
            matrix.formats.update(dict.fromkeys(tensor.format for tensor in tensors))
        if all(is_packable(tensor) for tensors in layers for tensor in tensors):
            matrix.weights = [_pack(tensors, runtime) for tensors in layers]
            matrices.append(matrix)
        else:
            skipped.append(f"{kernel}: no native kernel for {'+'.join(matrix.formats)} of {matrix.num_inputs} inputs")
    return matrices, skipped


def _pack(tensors: Sequence[WeightTensor], runtime: pelton_cpu.Runtime) -> pelton_cpu.LinearWeight:
    weight = pelton_cpu.LinearWeight(tensors[0].shape[1])
    for tensor in tensors:
        PackedWeights(runtime).add_to(weight, tensor)
    return weight


class _KernelBench:
    def __init__(self, spec: ModelSpec, runtime: pelton_cpu.Runtime, ceilings: Ceilings, plan: KernelBenchPlan) -> None:
        self._spec = spec
        self._runtime = runtime
        self._ceilings = ceilings
        self._plan = plan
        self._rng = np.random.default_rng(0)
        self._dram = ceilings.best(("dram",))
        self._product = ceilings.best(_PRODUCT_CEILINGS.get(runtime.isa, ("int8_plain",)))
        self._attention = ceilings.best(_ATTENTION_CEILINGS.get(runtime.isa, ("fp32_plain",)))
        self._wake_rows = self._floats(8, 32)
        self._other_bytes = np.ones(_EVICT_BYTES // 8, np.int64)

    def _floats(self, *shape: int) -> Floats:
        return self._rng.standard_normal(shape, dtype=np.float32)

    # -- products ---------------------------------------------------------------------------------

    def products(self, matrices: Sequence[_Matrix], num_rows: int) -> list[KernelFigure]:
        """The figures of whole steps' products: a step's time of each by its number of layers."""
        present = [m for m in matrices if m.name != "lm_head" or num_rows <= MAX_LOGITS_ROWS]
        inputs = {m.name: self._floats(num_rows, m.num_inputs) for m in present}
        outputs = {m.name: np.empty((num_rows, m.weights[0].num_outputs), np.float32) for m in present}
        times_s: dict[str, list[float]] = {m.name: [] for m in present}
        calls = [
            (m.name, weight, inputs[m.name].ctypes.data, outputs[m.name].ctypes.data)
            for layer in range(self._spec.num_layers)
            for m in present
            if m.name != "lm_head"
            for weight in (m.weights[layer],)
        ]
        calls += [
            (m.name, m.weights[0], inputs[m.name].ctypes.data, outputs[m.name].ctypes.data)
            for m in present
            if m.name == "lm_head"
        ]
        for _ in _repeats(self._plan.budget_s):
            sums = dict.fromkeys(times_s, 0.0)
            for name, weight, x, out in calls:
                start_s = time.perf_counter()
                self._runtime.linear(weight, x, num_rows, 0, out)
                sums[name] += time.perf_counter() - start_s
            for m in present:
                times_s[m.name].append(sums[m.name] / len(m.weights))
        return [make_figure(self._product_work(m, num_rows), times_s[m.name]) for m in present]

    def _product_work(self, matrix: _Matrix, num_rows: int) -> KernelWork:
        num_outputs = matrix.weights[0].num_outputs
        return KernelWork(
            kernel=matrix.name,
            detail=f"{num_outputs} x {matrix.num_inputs} {'+'.join(matrix.formats)}",
            num_rows=num_rows,
            num_ops=2.0 * num_rows * matrix.num_inputs * num_outputs,
            num_bytes=sum(weight.num_bytes for weight in matrix.weights) / len(matrix.weights),
            memory=self._dram,
            arithmetic=self._product,
        )

    # -- attention --------------------------------------------------------------------------------

    def attention(self) -> Iterator[KernelFigure]:
        """Decode and prefill at every context, for each kind of window that the model has."""
        for window in dict.fromkeys(group.sliding_window for group in self._spec.kv_groups):
            for context in self._plan.contexts:
                for num_requests in self._plan.decode_requests:
                    yield self._attend("attention decode", num_requests, 1, context, window)
                num_tokens = min(self._plan.prefill_tokens, context)
                yield self._attend("attention prefill", 1, num_tokens, context, window)

    def _attend(self, name: str, num_requests: int, num_tokens: int, context: int, window: int | None) -> KernelFigure:
        """`num_requests` with `num_tokens` new tokens each, the last of them at position `context` - 1."""
        spec = self._spec
        num_rows = num_requests * num_tokens
        num_columns = -(-context // _BLOCK_SIZE)
        num_blocks = num_requests * num_columns
        tables = self._rng.permutation(num_blocks).reshape(num_requests, num_columns)
        starts = np.arange(num_requests + 1, dtype=np.int64) * num_tokens
        seq_lens = np.full(num_requests, context, np.int64)
        plan = pelton_cpu.AttentionPlan(
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            _BLOCK_SIZE,
            window or 0,
            True,
            starts.ctypes.data,
            seq_lens.ctypes.data,
            num_requests,
            tables.ctypes.data,
            num_columns,
        )
        values_per_cache = num_blocks * _BLOCK_SIZE * spec.num_kv_heads * spec.head_dim
        num_caches = min(spec.num_layers, max(1, _CYCLE_BYTES // (4 * values_per_cache)))
        caches = self._bf16(num_caches, 2, values_per_cache)
        width = spec.num_heads * spec.head_dim
        query, out = self._floats(num_rows, width), np.empty((num_rows, width), np.float32)
        scale = spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
        is_small = caches.nbytes < _EVICT_BYTES
        times_s = []
        for index in _repeats(self._plan.budget_s):
            keys, values = caches[index % num_caches]
            if is_small:
                self._evict()
            start_s = time.perf_counter()
            self._runtime.attend(
                plan,
                num_rows,
                num_blocks,
                scale,
                spec.attention_softcap or 0.0,
                query.ctypes.data,
                width,
                keys.ctypes.data,
                values.ctypes.data,
                out.ctypes.data,
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
            memory=self._dram,
            arithmetic=self._attention,
        )
        return make_figure(work, times_s)

    def _bf16(self, *shape: int) -> npt.NDArray[np.uint16]:
        """Normal numbers; one million of them over and over."""
        some = (self._floats(min(1 << 20, int(np.prod(shape)))).view(np.uint32) >> 16).astype(np.uint16)
        return np.resize(some, shape)

    def _evict(self) -> None:
        """Let other bytes take the caches, then wake the threads that fell asleep meanwhile."""
        self._other_bytes.sum()
        rows = self._wake_rows
        for _ in range(4):
            self._runtime.rms_norm(
                rows.ctypes.data, 0, rows.ctypes.data, len(rows), rows.shape[1], 1e-6, rows.ctypes.data
            )

    # -- the rest ---------------------------------------------------------------------------------

    def elementwise(self, num_rows: int) -> Iterator[KernelFigure]:
        """What lies between the products, on rows that the caches hold, as a step has them."""
        spec, runtime = self._spec, self._runtime
        hidden, residual = self._floats(2, num_rows, spec.hidden_size)
        weight = np.ones(spec.hidden_size, np.float32)
        out = np.empty((num_rows, max(spec.hidden_size, spec.intermediate_size)), np.float32)
        addresses = hidden.ctypes.data, residual.ctypes.data, weight.ctypes.data
        yield self._repeat(
            "add_rms_norm",
            num_rows,
            16 * spec.hidden_size,
            lambda: runtime.rms_norm(*addresses, num_rows, spec.hidden_size, spec.rms_norm_eps, out.ctypes.data),
        )
        gate_up = self._floats(num_rows, 2 * spec.intermediate_size)
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
        vocab_size = self._spec.vocab_size
        logits = self._floats(num_rows, vocab_size)
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
        sampler = pelton_cpu.Sampler(self._runtime, vocab_size)
        return self._repeat(
            "sampling, greedy",
            num_rows,
            4 * vocab_size,
            lambda: sampler.sample(logits.ctypes.data, rows, positions, []),
        )

    def _rotate_and_store(self, num_rows: int) -> KernelFigure:
        spec = self._spec
        query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        width, half = query_size + 2 * kv_size, spec.rope.rotary_dim // 2
        qkv = self._floats(num_rows, width)
        angles = self._floats(num_rows, half)
        cos, sin = np.cos(angles), np.sin(angles)
        num_slots = -(-num_rows // _BLOCK_SIZE) * _BLOCK_SIZE
        slots = self._rng.permutation(num_slots)[:num_rows]
        caches = np.zeros((2, num_slots, kv_size), np.uint16)
        address = qkv.ctypes.data
        heads = spec.num_heads, spec.num_kv_heads, spec.head_dim, _BLOCK_SIZE, True
        tokens = num_rows, slots.ctypes.data, cos.ctypes.data, sin.ctypes.data, half
        rows = address, width, address + 4 * query_size, width, address + 4 * (query_size + kv_size), width
        keys, values = (cache.ctypes.data for cache in caches)
        return self._repeat(
            "rotary and store",
            num_rows,
            8 * query_size + 16 * kv_size + 8 * half,
            lambda: self._runtime.rotate_and_store(heads, tokens, rows, keys, values, num_slots),
        )

    def _repeat(self, name: str, num_rows: int, bytes_per_row: int, call: Callable[[], object]) -> KernelFigure:
        times_s = []
        for _ in _repeats(self._plan.budget_s / 8):
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
            memory=self._ceilings.memory_of(num_bytes),
        )
        return make_figure(work, times_s)


def _repeats(budget_s: float) -> Iterator[int]:
    """0, 1, 2 ... for about `budget_s`. The first round warms up: `make_figure` drops its time."""
    start_s = time.perf_counter()
    for index in range(_MAX_CALLS):
        if index >= _MIN_CALLS and time.perf_counter() - start_s > budget_s:
            return
        yield index
