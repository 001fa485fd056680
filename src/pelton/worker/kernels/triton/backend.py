"""`TritonKernels`: tensors on one device. A step runs as a `TritonProgram`, over the ops here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pelton.core.errors import ConfigError
from pelton.core.step_size import CPU_STEP, StepSize
from pelton.weights.lora.adapter import LoraWeights
from pelton.weights.tensors import ModelFiles, WeightTensor
from pelton.worker.forward_batch import Adapters
from pelton.worker.kernels.block_copies import BlockCopies
from pelton.worker.kernels.ops import AttentionShape, Forward, LayerCache, LoraSite
from pelton.worker.kernels.reference.block_copies import TensorCopies
from pelton.worker.kernels.triton.activation import gelu_tanh_mul, silu_mul, softcap
from pelton.worker.kernels.triton.attention import AttentionPlan, paged_attention, plan_attention
from pelton.worker.kernels.triton.block_copies import CudaCopies
from pelton.worker.kernels.triton.dense import load_dense
from pelton.worker.kernels.triton.device import (
    device_name,
    find_device,
    has_float8,
    is_interpreted,
    memory_errors,
    num_free_bytes,
    send,
)
from pelton.worker.kernels.triton.embedding import embedding
from pelton.worker.kernels.triton.flashinfer_attention import FlashInferAttention, FlashInferPlan, find_rivals
from pelton.worker.kernels.triton.kv_tiles import format_of
from pelton.worker.kernels.triton.linear import Scratch, TritonLinearLoader, linear
from pelton.worker.kernels.triton.lora import LoraBatch, TritonAdapter
from pelton.worker.kernels.triton.moe import TritonExperts, load_experts, moe
from pelton.worker.kernels.triton.norm import add_rms_norm, add_rms_norm_rounded, rms_norm
from pelton.worker.kernels.triton.packed_kv import rotate_and_store_packed
from pelton.worker.kernels.triton.program import TritonProgram
from pelton.worker.kernels.triton.rotary import rotate_and_store, split_heads
from pelton.worker.kernels.triton.sampling import DeviceSampler
from pelton.worker.kernels.triton.weights import num_weight_bytes
from pelton.worker.kv_format import KV_FORMATS

_LEAST_ROUNDED = 128  # values of a row: a block of scales
# Decodes of 256 read weights once for all; 8,192 tokens of a prompt keep an H100's products at their best for 0.2 s.
_GPU_STEP = StepSize(256, 8192)


class TritonKernels:
    """Implements `ops.Kernels` for tensors on `device`."""

    max_logits_rows = 1024  # of 128k float32 are 0.5 GB

    def __init__(
        self,
        dtype: str = "bfloat16",
        device: torch.device | None = None,
        *,
        batch_invariant: bool = True,
        quantization: str | None = None,
    ) -> None:
        """`batch_invariant` keeps law 3; without it products and attention may go where more rows are faster.
        `quantization` (int8, fp8, fp8_block, int4) rounds weights that files hold in floats.

        Raises `ConfigError` where kernels can run on no device here.
        """
        self.device = device or find_device()
        self.device_name = device_name(self.device)
        self.name = "triton (interpreted)" if is_interpreted() else "triton"
        self.dtype = dtype
        self._has_float8 = has_float8(self.device)
        others = (name for name in KV_FORMATS if name != dtype and (name != "fp8" or self._has_float8))
        self.kv_dtypes = (dtype, *others)
        self.step_size = _GPU_STEP if self.device.type == "cuda" else CPU_STEP
        self.batch_invariant = batch_invariant
        self._quantization = quantization
        self._scratch = Scratch(self.device)
        self._lora: LoraBatch | None = None  # of the last step that had adapters

    def give_up_kept(self) -> None:
        """What an op has kept for the next one."""
        self._scratch.forget_rounded()
        self._lora = None

    def num_free_bytes(self) -> int | None:
        return num_free_bytes(self.device)

    def num_promised_bytes(self) -> int:
        return 0

    def num_weight_bytes(self, tensor: WeightTensor) -> int:
        return num_weight_bytes(tensor, self._dtype)

    def make_linear_loader(self) -> TritonLinearLoader:
        return TritonLinearLoader(
            self._dtype,
            self.device,
            self._scratch,
            batch_invariant=self.batch_invariant,
            quantization=self._quantization,
        )

    def make_experts(self, gate_up: Sequence[Sequence[WeightTensor]], down: Sequence[WeightTensor]) -> TritonExperts:
        return load_experts(self.make_linear_loader(), gate_up, down, self._scratch)

    def round_weights(self, quantization: str) -> None:
        if quantization.startswith("fp8") and not self._has_float8:
            raise ConfigError(
                f"quantization is {quantization}, which needs a GPU of compute capability 8.9 or more: use w8a8 or int4"
            )
        self._quantization = quantization

    def load_embedding(self, table: WeightTensor) -> torch.Tensor:
        return load_dense(table, self._dtype, self.device)

    def make_block_copies(self) -> BlockCopies:
        return CudaCopies(self.device) if self.device.type == "cuda" else TensorCopies()

    def make_adapter(self, weights: LoraWeights, sites: Sequence[LoraSite]) -> TritonAdapter:
        with memory_errors():
            return TritonAdapter(weights, sites, self._dtype, self.device)

    def adapt(self, y: torch.Tensor, x: torch.Tensor, site: int) -> torch.Tensor:
        del x, site  # no row has an adapter
        return y

    def from_numpy(self, values: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)

    def to_numpy(self, x: torch.Tensor) -> npt.NDArray[np.float32]:
        return x.float().cpu().numpy()

    def take_pages(self, cache: torch.Tensor) -> None:
        """They come as they are written, or all at once."""

    def empty_cache(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        try:
            return torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise MemoryError(str(error)) from error

    def select_rows(self, x: torch.Tensor, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        return x[send(rows, self.device)]

    def compile(self, model: Forward, shapes: Sequence[AttentionShape], caches: Sequence[LayerCache]) -> TritonProgram:
        rivals: list[FlashInferAttention | None] = [None] * len(shapes)
        if not self.batch_invariant:
            rivals = find_rivals(shapes, caches, self._dtype, self.device)
        if any(rivals):
            self.name += ", flashinfer"
        return TritonProgram(self, model, shapes, caches, rivals)

    def weight_cache(self, files: ModelFiles, path: Path | None) -> AbstractContextManager[None]:
        """Nothing is kept."""
        del files, path
        return memory_errors()

    def make_sampler(self, vocab_size: int, eos_token_ids: Iterable[int]) -> DeviceSampler:
        return DeviceSampler(vocab_size, eos_token_ids, self.device)

    def add_lora(self, y: torch.Tensor, x: torch.Tensor, site: int, adapters: Adapters) -> torch.Tensor:
        if self._lora is None or not self._lora.is_of(adapters):
            self._lora = LoraBatch(adapters, self.device, self._lora)
        return self._lora.add(y, x, site)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where all products round rows alike, the normed ones are rounded on the way: most norms feed a product."""
        kinds = self._scratch.row_kinds
        if len(kinds) != 1 or x.shape[1] < _LEAST_ROUNDED:
            return add_rms_norm(x, residual, weight, eps)
        (kind,) = kinds
        normed, codes = add_rms_norm_rounded(x, residual, weight, eps, kind)
        self._scratch.keep_rounded(normed, kind, codes)
        return normed, residual

    def moe(
        self, x: torch.Tensor, logits: torch.Tensor, experts: TritonExperts, num_chosen: int, normalizes: bool
    ) -> torch.Tensor:
        return moe(x, logits, experts, num_chosen, normalizes, silu_mul)

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
        store = rotate_and_store_packed if format_of(key_cache).is_packed else rotate_and_store
        return store(query, key, value, cos, sin, key_cache, value_cache, slot_mapping)

    def paged_attention(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        plan: AttentionPlan | FlashInferPlan,
        scale: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        if isinstance(plan, FlashInferPlan):
            if softcap is None:
                return plan.attend(query, key_cache, value_cache, scale)
            plan = plan.own
        return paged_attention(query, key_cache, value_cache, plan, scale, softcap)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    linear = staticmethod(linear)
    embedding = staticmethod(embedding)
    rms_norm = staticmethod(rms_norm)
    split_heads = staticmethod(split_heads)
    plan_attention = staticmethod(plan_attention)
    silu_mul = staticmethod(silu_mul)
    gelu_tanh_mul = staticmethod(gelu_tanh_mul)
    softcap = staticmethod(softcap)
