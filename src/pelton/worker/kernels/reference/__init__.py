"""The reference backend: torch, on the CPU. Obvious rather than fast, and exact under law 3 in float32."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from pelton.weights.tensors import ModelFiles, WeightTensor
from pelton.worker.kernels.reference.activation import gelu_tanh_mul, silu_mul, softcap
from pelton.worker.kernels.reference.attention import paged_attention
from pelton.worker.kernels.reference.attention_plan import plan_attention
from pelton.worker.kernels.reference.embedding import embedding
from pelton.worker.kernels.reference.linear import DenseLoader, linear
from pelton.worker.kernels.reference.norm import add_rms_norm, rms_norm
from pelton.worker.kernels.reference.rotary import rotate_and_store


class ReferenceKernels:
    """Implements `ops.Kernels`."""

    name = "reference"
    kv_dtype: torch.dtype | None = None
    make_linear_loader = DenseLoader

    def num_weight_bytes(self, tensor: WeightTensor, dtype: torch.dtype) -> int:
        return math.prod(tensor.shape) * dtype.itemsize

    def weight_cache(self, files: ModelFiles, path: Path | None) -> AbstractContextManager[None]:
        """Nothing is kept."""
        del files, path
        return nullcontext()

    linear = staticmethod(linear)
    embedding = staticmethod(embedding)
    rms_norm = staticmethod(rms_norm)
    add_rms_norm = staticmethod(add_rms_norm)
    rotate_and_store = staticmethod(rotate_and_store)
    plan_attention = staticmethod(plan_attention)
    paged_attention = staticmethod(paged_attention)
    silu_mul = staticmethod(silu_mul)
    gelu_tanh_mul = staticmethod(gelu_tanh_mul)
    softcap = staticmethod(softcap)
