"""The reference backend: torch, on the CPU. Obvious rather than fast, and exact under law 3 in float32."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pelton.core.errors import ConfigError
from pelton.core.step_size import CPU_STEP
from pelton.weights.lora.adapter import LoraWeights
from pelton.weights.tensors import ModelFiles, WeightTensor
from pelton.worker.kernels.eager import EagerProgram
from pelton.worker.kernels.ops import DTYPE_BYTES, AttentionShape, Forward, LayerCache, LoraSite
from pelton.worker.kernels.reference.activation import gelu_tanh_mul, silu_mul, softcap
from pelton.worker.kernels.reference.attention import paged_attention
from pelton.worker.kernels.reference.attention_plan import plan_attention
from pelton.worker.kernels.reference.block_copies import TensorCopies
from pelton.worker.kernels.reference.embedding import embedding
from pelton.worker.kernels.reference.linear import DenseLoader, linear
from pelton.worker.kernels.reference.lora import ReferenceAdapter, add_lora
from pelton.worker.kernels.reference.moe import ReferenceExperts, make_experts, moe
from pelton.worker.kernels.reference.norm import add_rms_norm, rms_norm
from pelton.worker.kernels.reference.rotary import rotate_and_store, split_heads
from pelton.worker.sampling.reference import ReferenceSampler
from pelton.worker.sampling.sampler import Sampler


class ReferenceKernels:
    """Implements `ops.Kernels` for tensors."""

    name = "reference"
    device_name = "cpu"
    step_size = CPU_STEP
    max_logits_rows = 64  # of 152k float32 are 39 MB

    def __init__(self, dtype: str = "float32", num_threads: int | None = None) -> None:
        """`num_threads` is torch's own setting, one for the process; None leaves it as it is."""
        self.dtype = dtype
        self.kv_dtypes = (dtype, *(other for other in DTYPE_BYTES if other != dtype))
        if num_threads is not None:
            torch.set_num_threads(num_threads)
            # One operation runs at a time; a second pool would only take cores from the first. Refused where
            # an embedding program has used torch before: then its number stands.
            if torch.get_num_interop_threads() != 1:
                with contextlib.suppress(RuntimeError):
                    torch.set_num_interop_threads(1)

    def num_weight_bytes(self, tensor: WeightTensor) -> int:
        return math.prod(tensor.shape) * DTYPE_BYTES[self.dtype]

    def make_linear_loader(self) -> DenseLoader:
        return DenseLoader(getattr(torch, self.dtype))

    def make_experts(self, gate_up: Sequence[Sequence[WeightTensor]], down: Sequence[WeightTensor]) -> ReferenceExperts:
        return make_experts(getattr(torch, self.dtype), gate_up, down)

    def make_adapter(self, weights: LoraWeights, sites: Sequence[LoraSite]) -> ReferenceAdapter:
        return ReferenceAdapter(weights, sites, getattr(torch, self.dtype))

    def adapt(self, y: torch.Tensor, x: torch.Tensor, site: int) -> torch.Tensor:
        del x, site  # no row has an adapter
        return y

    def make_block_copies(self) -> TensorCopies:
        return TensorCopies()

    def num_free_bytes(self) -> None:
        return None

    def num_promised_bytes(self) -> int:
        return 0

    def round_weights(self, quantization: str) -> None:
        raise ConfigError(f"quantization {quantization} needs a GPU; the reference rounds to w8a8 and w4a8")

    def load_embedding(self, table: WeightTensor) -> WeightTensor:
        """As it is: rows are decoded from the file's own bytes."""
        return table

    def embedding(self, token_ids: torch.Tensor, table: WeightTensor, scale: float = 1.0) -> torch.Tensor:
        return embedding(token_ids, table, scale, getattr(torch, self.dtype))

    def from_numpy(self, values: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(values)

    def to_numpy(self, x: torch.Tensor) -> npt.NDArray[np.float32]:
        return x.float().numpy()

    def take_pages(self, cache: torch.Tensor) -> None:
        """They come as they are written, or all at once."""

    def empty_cache(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        try:
            return torch.empty(shape, dtype=getattr(torch, dtype))
        except RuntimeError as error:  # what torch's CPU allocator raises
            raise MemoryError(str(error)) from error

    def select_rows(self, x: torch.Tensor, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        return x[torch.from_numpy(rows)]

    def compile(
        self, model: Forward, shapes: Sequence[AttentionShape], caches: Sequence[LayerCache]
    ) -> ReferenceProgram:
        return ReferenceProgram(self, model, shapes, caches)

    def weight_cache(self, files: ModelFiles, path: Path | None) -> AbstractContextManager[None]:
        """Nothing is kept."""
        del files, path
        return nullcontext()

    linear = staticmethod(linear)
    add_lora = staticmethod(add_lora)
    rms_norm = staticmethod(rms_norm)
    add_rms_norm = staticmethod(add_rms_norm)
    split_heads = staticmethod(split_heads)
    rotate_and_store = staticmethod(rotate_and_store)
    plan_attention = staticmethod(plan_attention)
    paged_attention = staticmethod(paged_attention)
    silu_mul = staticmethod(silu_mul)
    gelu_tanh_mul = staticmethod(gelu_tanh_mul)
    softcap = staticmethod(softcap)
    moe = staticmethod(moe)

    def make_sampler(self, vocab_size: int, eos_token_ids: Iterable[int]) -> Sampler:
        return ReferenceSampler(vocab_size, eos_token_ids)


class ReferenceProgram(EagerProgram):
    forward = torch.inference_mode()(EagerProgram.forward)
    logits = torch.inference_mode()(EagerProgram.logits)
    hidden = torch.inference_mode()(EagerProgram.hidden)
