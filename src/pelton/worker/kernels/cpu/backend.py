"""The native backend: `pelton_cpu`, C++ kernels over packed weights. Activations and results are float32.

Quantized weights stay in their 4 to 8 bits, repacked without loss; activations are quantized to 8 bits, per row
and group of 32, as they enter a product with them. Dense weights are multiplied in float32, and so is everything
where the activations are to stay float32. Activations of another type than float32 go through the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pelton.weights.tensors import ModelFiles, WeightTensor
from pelton.worker.kernels.cpu import pelton_cpu
from pelton.worker.kernels.cpu.packed_weights import PackedWeights, PlacedMatrix
from pelton.worker.kernels.cpu.weight_cache import open_weight_cache
from pelton.worker.kernels.ops import AttentionShape
from pelton.worker.kernels.reference import ReferenceKernels

_LARGE_VALUES = 1 << 20
_KV_TYPES = (torch.float32, torch.bfloat16)


class NativeLoader:
    """Implements `ops.LinearLoader`."""

    def __init__(self, kernels: NativeKernels, dtype: torch.dtype) -> None:
        self._kernels = kernels
        self._dense = ReferenceKernels.make_linear_loader(dtype)
        self._dtype = dtype

    def load(self, tensors: Sequence[WeightTensor]) -> Any:
        if self._dtype is not torch.float32:
            return self._dense.load(tensors)
        weight = pelton_cpu.LinearWeight(tensors[0].shape[1])
        for tensor in tensors:
            self._kernels.packed_weights.add_to(weight, tensor)
        return weight


class NativeKernels(ReferenceKernels):
    """Implements `ops.Kernels`. One operation at a time."""

    kv_dtype: torch.dtype | None = torch.bfloat16

    def __init__(
        self, num_threads: int, isa: str | None = None, cpus: Sequence[int] = (), activation_dtype: str = "auto"
    ) -> None:
        self.runtime = pelton_cpu.Runtime(isa, num_threads, list(cpus), activation_dtype)
        self.name = f"native ({self.runtime.isa})"
        self.packed_weights = PackedWeights(self.runtime)
        self._large: dict[int, torch.Tensor] = {}

    def make_linear_loader(self, dtype: torch.dtype) -> NativeLoader:  # type: ignore[override]
        return NativeLoader(self, dtype)

    @contextmanager
    def weight_cache(self, files: ModelFiles, path: Path | None) -> Iterator[None]:
        with open_weight_cache(self.runtime, files, path) as self.packed_weights:
            yield
        self.packed_weights = PackedWeights(self.runtime)

    def num_weight_bytes(self, tensor: WeightTensor, dtype: torch.dtype) -> int:
        if dtype is not torch.float32 or len(tensor.shape) != 2:
            return super().num_weight_bytes(tensor, dtype)
        return PlacedMatrix.of(tensor).num_bytes

    def linear(self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not isinstance(weight, pelton_cpu.LinearWeight):
            return super().linear(x, weight, bias)
        if x.shape[1] != weight.num_inputs:
            raise ValueError(f"x has {x.shape[1]} columns, but the weight takes {weight.num_inputs}")
        x = x.contiguous()
        out = self._make_output(len(x), weight)
        self.runtime.linear(weight, x.data_ptr(), len(x), 0 if bias is None else bias.data_ptr(), out.data_ptr())
        return out

    def _make_output(self, num_rows: int, weight: Any) -> torch.Tensor:
        """Large results far wider than their inputs (logits, gates) share one memory per width: fresh pages
        each step would cost more than filling them, and these are consumed before the next of their width.
        What the residual stream may hold on to is not that wide."""
        num_columns = weight.num_outputs
        num_values = num_rows * num_columns
        if num_values < _LARGE_VALUES or num_columns < 4 * weight.num_inputs:
            return torch.empty(num_rows, num_columns)
        memory = self._large.get(num_columns)
        if memory is None or len(memory) < num_values:
            memory = self._large[num_columns] = torch.empty(num_values)
        return memory[:num_values].view(num_rows, num_columns)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if x.dtype is not torch.float32:
            return super().rms_norm(x, weight, eps)
        x = x.contiguous()
        out = torch.empty_like(x)
        size = x.shape[-1]
        self.runtime.rms_norm(x.data_ptr(), 0, weight.data_ptr(), x.numel() // size, size, eps, out.data_ptr())
        return out

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if x.dtype is not torch.float32:
            return super().add_rms_norm(x, residual, weight, eps)
        x, residual = x.contiguous(), residual.contiguous()
        out = torch.empty_like(x)
        size = x.shape[-1]
        num_rows = x.numel() // size
        self.runtime.rms_norm(x.data_ptr(), residual.data_ptr(), weight.data_ptr(), num_rows, size, eps, out.data_ptr())
        return out, residual

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._gated(gate_up, False) if gate_up.dtype is torch.float32 else super().silu_mul(gate_up)

    def gelu_tanh_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._gated(gate_up, True) if gate_up.dtype is torch.float32 else super().gelu_tanh_mul(gate_up)

    def _gated(self, gate_up: torch.Tensor, gelu: bool) -> torch.Tensor:
        gate_up = gate_up.contiguous()
        num_rows, double = gate_up.shape
        out = torch.empty(num_rows, double // 2)
        self.runtime.gated(gelu, gate_up.data_ptr(), num_rows, double // 2, out.data_ptr())
        return out

    def plan_attention(  # type: ignore[override]
        self,
        shape: AttentionShape,
        query_start_loc: Sequence[int],
        seq_lens: Sequence[int],
        block_tables: torch.Tensor,
    ) -> NativePlan:
        return NativePlan(shape, query_start_loc, seq_lens, block_tables)

    def rotate_and_store(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        if query.dtype is not torch.float32 or key_cache.dtype not in _KV_TYPES:
            return super().rotate_and_store(query, key, value, cos, sin, key_cache, value_cache, slot_mapping)
        query, key, value = map(_with_whole_rows, (query, key, value))
        num_tokens, num_heads, head_dim = query.shape
        self.runtime.rotate_and_store(
            (num_heads, key.shape[1], head_dim, key_cache.dtype is torch.bfloat16),
            (num_tokens, slot_mapping.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[1]),
            (query.data_ptr(), query.stride(0), key.data_ptr(), key.stride(0), value.data_ptr(), value.stride(0)),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            key_cache.shape[0] * key_cache.shape[1],
        )
        return query

    def paged_attention(  # type: ignore[override]
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        plan: NativePlan,
        scale: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        num_tokens, num_heads, head_dim = query.shape
        if query.dtype is not torch.float32 or key_cache.dtype not in _KV_TYPES:
            return super().paged_attention(query, key_cache, value_cache, plan.reference(), scale, softcap)
        query = _with_whole_rows(query)
        out = torch.empty(num_tokens, num_heads * head_dim)
        self.runtime.attend(
            plan.native(key_cache.dtype),
            num_tokens,
            key_cache.shape[0],
            scale,
            softcap or 0.0,
            query.data_ptr(),
            query.stride(0),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            out.data_ptr(),
        )
        return out


def _with_whole_rows(x: torch.Tensor) -> torch.Tensor:
    """[T, heads, D] whose tokens may lie apart, but each in one piece."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


class NativePlan:
    """A step's requests, handed over once for all layers of a KV group."""

    def __init__(
        self,
        shape: AttentionShape,
        query_start_loc: Sequence[int],
        seq_lens: Sequence[int],
        block_tables: torch.Tensor,
    ) -> None:
        self._args = (shape, query_start_loc, seq_lens, block_tables)
        self._native: Any = None
        self._reference: Any = None

    def native(self, kv_dtype: torch.dtype) -> Any:
        if self._native is None:
            shape, starts, seq_lens, block_tables = self._args
            block_tables = block_tables.contiguous()
            requests = [
                (start, end - start, seq_len, row)
                for row, (start, end, seq_len) in enumerate(zip(starts, starts[1:], seq_lens, strict=False))
            ]
            self._native = pelton_cpu.AttentionPlan(
                shape.num_heads,
                shape.num_kv_heads,
                shape.head_dim,
                shape.block_size,
                shape.sliding_window or 0,
                kv_dtype is torch.bfloat16,
                requests,
                block_tables.data_ptr(),
                *block_tables.shape,
            )
        return self._native

    def reference(self) -> Any:
        if self._reference is None:
            self._reference = ReferenceKernels.plan_attention(*self._args)
        return self._reference
