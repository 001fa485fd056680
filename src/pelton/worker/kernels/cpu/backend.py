"""The native backend: `pelton_cpu`, C++ kernels over packed weights. Arrays are numpy's; activations float32.

Quantized weights stay in their 4 to 8 bits, repacked without loss; activations are rounded to bfloat16 or to 8 bits,
per row and group of 32, as they enter a product with them. Dense weights are multiplied in float32, and so is
everything where the activations are to stay float32.
A step runs as a recorded program (`program.py`); the ops here, one call each, are what it is tested against.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from pelton.core.errors import ConfigError, UnsupportedModelError
from pelton.core.step_size import CPU_STEP
from pelton.weights.channel_quantization import in_groups
from pelton.weights.lora.adapter import LoraWeights
from pelton.weights.tensors import ModelFiles, WeightTensor
from pelton.worker.forward_batch import Adapters
from pelton.worker.kernels.block_copies import ArrayCopies
from pelton.worker.kernels.cpu import pelton_cpu
from pelton.worker.kernels.cpu.adapter import NativeAdapter, native_rows
from pelton.worker.kernels.cpu.arrays import (
    KV_TYPES,
    Cache,
    Floats,
    Ints,
    address,
    embedding_table,
    is_bfloat16,
    native_shape,
)
from pelton.worker.kernels.cpu.packed_weights import PackedWeights, PlacedMatrix
from pelton.worker.kernels.cpu.program import NativeProgram
from pelton.worker.kernels.cpu.recorder import NO_MIXTURES
from pelton.worker.kernels.cpu.sampler import NativeSampler
from pelton.worker.kernels.cpu.weight_cache import open_weight_cache
from pelton.worker.kernels.ops import AttentionShape, Forward, LayerCache, LoraSite


class NativeLoader:
    """Implements `ops.LinearLoader`."""

    def __init__(self, packed_weights: PackedWeights) -> None:
        self._packed_weights = packed_weights

    def load(self, tensors: Sequence[WeightTensor]) -> pelton_cpu.LinearWeight:
        weight = pelton_cpu.LinearWeight(tensors[0].shape[1])
        if len({tensor.format for tensor in tensors}) > 1:
            tensors = [in_groups(tensor) for tensor in tensors]  # activations are rounded once for all
        for tensor in tensors:
            self._packed_weights.add_to(weight, tensor)
        return weight


class NativeKernels:
    """Implements `ops.Kernels`. One operation at a time."""

    dtype = "float32"
    kv_dtypes = tuple(KV_TYPES)
    device_name = "cpu"
    step_size = CPU_STEP
    max_logits_rows = 64  # of 152k float32 are 39 MB

    def __init__(
        self, num_threads: int, isa: str | None = None, cpus: Sequence[int] = (), activation_dtype: str = "auto"
    ) -> None:
        self.runtime = pelton_cpu.Runtime(isa, num_threads, list(cpus), activation_dtype)
        self.name = f"native ({self.runtime.isa})"
        self.packed_weights = self._loaded_weights = PackedWeights(self.runtime)

    def make_linear_loader(self) -> NativeLoader:
        return NativeLoader(self.packed_weights)

    @contextmanager
    def weight_cache(self, files: ModelFiles, path: Path | None) -> Iterator[None]:
        with open_weight_cache(self.runtime, files, path) as self.packed_weights:
            yield
        self._loaded_weights = self.packed_weights
        self.packed_weights = PackedWeights(self.runtime)

    def num_weight_bytes(self, tensor: WeightTensor) -> int:
        return PlacedMatrix.of(tensor).num_bytes if len(tensor.shape) == 2 else math.prod(tensor.shape) * 4

    def from_numpy(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.ascontiguousarray(values)

    def to_numpy(self, x: Floats) -> Floats:
        return x

    def empty_cache(self, shape: tuple[int, ...], dtype: str) -> Cache:
        return np.empty(shape, dtype=KV_TYPES[dtype])

    def take_pages(self, cache: Cache) -> None:
        pelton_cpu.take_pages(cache.ctypes.data, cache.nbytes)

    def select_rows(self, x: Floats, rows: Ints) -> Floats:
        return x[rows]

    def compile(self, model: Forward, shapes: Sequence[AttentionShape], caches: Sequence[LayerCache]) -> NativeProgram:
        return NativeProgram(self.runtime, model, shapes, caches)

    def linear(self, x: Floats, weight: pelton_cpu.LinearWeight, bias: Floats | None = None) -> Floats:
        x = np.ascontiguousarray(x)
        if x.shape[1] != weight.num_inputs:
            raise ValueError(f"x has {x.shape[1]} columns, but the weight takes {weight.num_inputs}")
        out = np.empty((len(x), weight.num_outputs), dtype=np.float32)
        self.runtime.linear(weight, address(x), len(x), 0 if bias is None else address(bias), address(out))
        return out

    def adapt(self, y: Floats, x: Floats, site: int) -> Floats:
        del x, site  # no row has an adapter
        return y

    def make_experts(self, gate_up: Sequence[Sequence[WeightTensor]], down: Sequence[WeightTensor]) -> NoReturn:
        del gate_up, down
        raise UnsupportedModelError(NO_MIXTURES)

    def moe(self, x: Floats, logits: Floats, experts: Any, num_chosen: int, normalizes: bool) -> NoReturn:
        del x, logits, experts, num_chosen, normalizes
        raise UnsupportedModelError(NO_MIXTURES)

    def make_adapter(self, weights: LoraWeights, sites: Sequence[LoraSite]) -> NativeAdapter:
        return NativeAdapter(weights, sites)

    def add_lora(self, y: Floats, x: Floats, site: int, adapters: Adapters) -> Floats:
        pelton_cpu.add_lora(self.runtime, native_rows(adapters), site, np.ascontiguousarray(x), y)
        return y

    def make_block_copies(self) -> ArrayCopies:
        return ArrayCopies()

    def num_free_bytes(self) -> None:
        return None

    def num_promised_bytes(self) -> int:
        return self._loaded_weights.num_mapped_bytes

    def round_weights(self, quantization: str) -> None:
        raise ConfigError(f"quantization {quantization} needs a GPU; native kernels round to w8a8 and w4a8")

    def load_embedding(self, table: WeightTensor) -> WeightTensor:
        """As it is: rows are decoded from the file's own bytes."""
        return table

    def embedding(self, token_ids: Ints, table: WeightTensor, scale: float = 1.0) -> Floats:
        out = np.empty((len(token_ids), table.shape[1]), dtype=np.float32)
        self.runtime.embedding(embedding_table(table, scale), address(token_ids), len(token_ids), address(out))
        return out

    def rms_norm(self, x: Floats, weight: Floats, eps: float) -> Floats:
        x = np.ascontiguousarray(x)
        out = np.empty_like(x)
        size = x.shape[-1]
        self.runtime.rms_norm(address(x), 0, address(weight), x.size // size, size, eps, address(out))
        return out

    def add_rms_norm(self, x: Floats, residual: Floats, weight: Floats, eps: float) -> tuple[Floats, Floats]:
        x, residual = np.ascontiguousarray(x), np.ascontiguousarray(residual)
        out = np.empty_like(x)
        size = x.shape[-1]
        num_rows = x.size // size
        self.runtime.rms_norm(address(x), address(residual), address(weight), num_rows, size, eps, address(out))
        return out, residual

    def silu_mul(self, gate_up: Floats) -> Floats:
        return self._gated(gate_up, False)

    def gelu_tanh_mul(self, gate_up: Floats) -> Floats:
        return self._gated(gate_up, True)

    def _gated(self, gate_up: Floats, gelu: bool) -> Floats:
        gate_up = np.ascontiguousarray(gate_up)
        num_rows, double = gate_up.shape
        out = np.empty((num_rows, double // 2), dtype=np.float32)
        self.runtime.gated(gelu, address(gate_up), num_rows, double // 2, address(out))
        return out

    def softcap(self, x: Floats, cap: float) -> Floats:
        x = np.ascontiguousarray(x)
        self.runtime.softcap(address(x), len(x), x.shape[-1], cap)
        return x

    def split_heads(self, x: Floats, num_heads: int, num_kv_heads: int) -> tuple[Floats, Floats, Floats]:
        heads = x.reshape(len(x), num_heads + 2 * num_kv_heads, -1)
        first_value = num_heads + num_kv_heads
        return heads[:, :num_heads], heads[:, num_heads:first_value], heads[:, first_value:]

    def plan_attention(
        self, shape: AttentionShape, query_start_loc: Ints, seq_lens: Ints, block_tables: Ints
    ) -> NativePlan:
        return NativePlan(self.runtime, shape, query_start_loc, seq_lens, block_tables)

    def rotate_and_store(
        self,
        query: Floats,
        key: Floats,
        value: Floats,
        cos: Floats,
        sin: Floats,
        key_cache: Cache,
        value_cache: Cache,
        slot_mapping: Ints,
    ) -> Floats:
        query, key, value = map(_with_whole_rows, (query, key, value))
        num_tokens, num_heads, head_dim = query.shape
        self.runtime.rotate_and_store(
            (num_heads, key.shape[1], head_dim, key_cache.shape[1], is_bfloat16(key_cache)),
            (num_tokens, address(slot_mapping), address(cos), address(sin), cos.shape[1]),
            tuple(number for x in (query, key, value) for number in (address(x), x.strides[0] // 4)),
            address(key_cache),
            address(value_cache),
            key_cache.shape[0] * key_cache.shape[1],
        )
        return query

    def make_sampler(self, vocab_size: int, eos_token_ids: Iterable[int]) -> NativeSampler:
        return NativeSampler(self.runtime, vocab_size, eos_token_ids)

    def paged_attention(
        self,
        query: Floats,
        key_cache: Cache,
        value_cache: Cache,
        plan: NativePlan,
        scale: float,
        softcap: float | None = None,
    ) -> Floats:
        num_tokens, num_heads, head_dim = query.shape
        query = _with_whole_rows(query)
        out = np.empty((num_tokens, num_heads * head_dim), dtype=np.float32)
        self.runtime.attend(
            plan.native(is_bfloat16(key_cache)),
            num_tokens,
            key_cache.shape[0],
            scale,
            softcap or 0.0,
            address(query),
            query.strides[0] // 4,
            address(key_cache),
            address(value_cache),
            address(out),
        )
        return out


class NativePlan:
    """A step's requests, handed over once for all layers of a KV group."""

    def __init__(
        self,
        runtime: pelton_cpu.Runtime,
        shape: AttentionShape,
        query_start_loc: Ints,
        seq_lens: Ints,
        block_tables: Ints,
    ) -> None:
        self._runtime = runtime
        self._args = (shape, query_start_loc, seq_lens, np.ascontiguousarray(block_tables))
        self._native: pelton_cpu.AttentionPlan | None = None

    def native(self, bf16: bool) -> pelton_cpu.AttentionPlan:
        if self._native is None:
            shape, query_start_loc, seq_lens, block_tables = self._args
            self._native = pelton_cpu.AttentionPlan(
                self._runtime,
                *native_shape(shape, bf16),
                address(query_start_loc),
                address(seq_lens),
                len(seq_lens),
                address(block_tables),
                block_tables.shape[1],
            )
        return self._native


def _with_whole_rows(x: Floats) -> Floats:
    """[T, heads, D] whose tokens may lie apart, but each in one piece."""
    return x if x.strides[2] == 4 and x.strides[1] == 4 * x.shape[2] else np.ascontiguousarray(x)
