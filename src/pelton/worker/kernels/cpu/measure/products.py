"""Products with the model's packed weights, as a step runs them: layer after layer, the output head at the end,
so that the weights of a layer have left the caches when their turn comes again. Legend as in ops.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pelton.bench.roofline import KernelFigure, KernelWork, make_figure
from pelton.weights.tensors import ModelFiles, WeightTensor
from pelton.worker.kernels.cpu import pelton_cpu
from pelton.worker.kernels.cpu.measure.setup import MAX_LOGITS_ROWS, Setup, repeats
from pelton.worker.kernels.cpu.packed_weights import PackedWeights, is_kept_dense

_LAYER_MATRICES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
ORDER = (*_LAYER_MATRICES, "gated_mlp", "lm_head")


@dataclass(slots=True)
class Matrix:
    """One product of the model, with its weight in every layer."""

    name: str
    num_inputs: int
    weights: list[pelton_cpu.LinearWeight] = field(default_factory=list)
    formats: dict[str, None] = field(default_factory=dict)  # an ordered set


def load_matrices(files: ModelFiles, runtime: pelton_cpu.Runtime) -> tuple[list[Matrix], list[str]]:
    """The model's products in the order of a step, and those that are not quantized, which no ceiling here is for."""
    spec = files.spec
    head = "model.embed_tokens" if spec.tie_word_embeddings else "lm_head"
    matrices: list[Matrix] = []
    skipped: list[str] = []
    for kernel, names in {**_LAYER_MATRICES, "lm_head": (head,)}.items():
        prefixes = [""] if kernel == "lm_head" else [f"model.layers.{i}." for i in range(spec.num_layers)]
        layers = [[files.tensor(f"{prefix}{name}.weight") for name in names] for prefix in prefixes]
        matrix = Matrix(kernel, layers[0][0].shape[1])
        for tensors in layers:
            matrix.formats.update(dict.fromkeys(tensor.format for tensor in tensors))
        if any(is_kept_dense(tensor) for tensors in layers for tensor in tensors):
            skipped.append(f"{kernel}: {'+'.join(matrix.formats)} of {matrix.num_inputs} inputs is kept in floats")
        else:
            matrix.weights = [_pack(tensors, runtime) for tensors in layers]
            matrices.append(matrix)
    return matrices, skipped


def _pack(tensors: Sequence[WeightTensor], runtime: pelton_cpu.Runtime) -> pelton_cpu.LinearWeight:
    weight = pelton_cpu.LinearWeight(tensors[0].shape[1])
    for tensor in tensors:
        PackedWeights(runtime).add_to(weight, tensor)
    return weight


class ProductBench:
    def __init__(self, setup: Setup, matrices: Sequence[Matrix]) -> None:
        self._setup = setup
        self._matrices = matrices
        self._mlps = self._make_mlps({matrix.name: matrix for matrix in matrices})

    def figures(self, num_rows: int) -> list[KernelFigure]:
        """The figures of whole steps' products: a step's time of each by its number of layers."""
        present = [m for m in self._matrices if m.name != "lm_head" or num_rows <= MAX_LOGITS_ROWS]
        inputs = {m.name: self._setup.floats(num_rows, m.num_inputs) for m in present}
        outputs = {m.name: np.empty((num_rows, m.weights[0].num_outputs), np.float32) for m in present}
        times_s: dict[str, list[float]] = {m.name: [] for m in present}
        calls = [
            (m.name, weight, inputs[m.name].ctypes.data, outputs[m.name].ctypes.data)
            for layer in range(self._setup.spec.num_layers)
            for m in present
            if m.name != "lm_head"
            for weight in (m.weights[layer],)
        ]
        calls += [
            (m.name, m.weights[0], inputs[m.name].ctypes.data, outputs[m.name].ctypes.data)
            for m in present
            if m.name == "lm_head"
        ]
        for _ in repeats(self._setup.plan.budget_s):
            sums = dict.fromkeys(times_s, 0.0)
            for name, weight, x, out in calls:
                start_s = time.perf_counter()
                self._setup.runtime.linear(weight, x, num_rows, 0, out)
                sums[name] += time.perf_counter() - start_s
            for m in present:
                times_s[m.name].append(sums[m.name] / len(m.weights))
        figures = [make_figure(self._work(m, num_rows), times_s[m.name]) for m in present]
        return [*figures, self._mlp_figure(num_rows)] if self._mlps else figures

    def _work(self, matrix: Matrix, num_rows: int) -> KernelWork:
        num_outputs = matrix.weights[0].num_outputs
        return KernelWork(
            kernel=matrix.name,
            detail=f"{num_outputs} x {matrix.num_inputs} {'+'.join(matrix.formats)}",
            num_rows=num_rows,
            num_ops=2.0 * num_rows * matrix.num_inputs * num_outputs,
            num_bytes=sum(weight.num_bytes for weight in matrix.weights) / len(matrix.weights),
            memory=self._setup.dram,
            arithmetic=self._setup.products,
        )

    # A gated feed-forward layer runs as one op, which only programs have.

    def _make_mlps(self, matrices: dict[str, Matrix]) -> list[pelton_cpu.Program]:
        """A program for each layer: op 0 brings the rows, op 1 is the layer."""
        if "gate_up" not in matrices or "down" not in matrices:
            return []
        spec = self._setup.spec
        programs = []
        for wide, narrow in zip(matrices["gate_up"].weights, matrices["down"].weights, strict=True):
            program = pelton_cpu.Program(self._setup.runtime, [], 0)
            out, x = program.add_slot(spec.hidden_size), program.add_slot(spec.hidden_size)
            program.select_rows(spec.hidden_size, (x, 0))
            program.gated_mlp(spec.hidden_act != "silu", wide, 0, narrow, 0, (-1, -1), (x, 0), (out, 0))
            program.time_ops()
            programs.append(program)
        return programs

    def _mlp_figure(self, num_rows: int) -> KernelFigure:
        spec = self._setup.spec
        hidden, result = self._setup.floats(2, num_rows, spec.hidden_size)
        rows = np.arange(num_rows)
        times_s = []
        for _ in repeats(self._setup.plan.budget_s):
            total_s = 0.0
            for program in self._mlps:
                program.run_rows(hidden, rows, result)
                total_s += program.take_times()[1]
            times_s.append(total_s / len(self._mlps))
        matrices = [matrix for matrix in self._matrices if matrix.name in ("gate_up", "down")]
        works = [self._work(matrix, num_rows) for matrix in matrices]
        work = KernelWork(
            kernel="gated_mlp",
            detail="gate_up, activation, down in one",
            num_rows=num_rows,
            num_ops=sum(each.num_ops for each in works),
            num_bytes=sum(each.num_bytes for each in works),
            memory=self._setup.dram,
            arithmetic=self._setup.products,
        )
        return make_figure(work, times_s)
