"""Self-attention over the paged cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pelton.core.model_spec import ModelSpec
from pelton.worker.kernels.ops import Kernels
from pelton.worker.layers.linear import Linear
from pelton.worker.layers.norm import RMSNorm


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What a layer's attention needs of the step. Shared by layers of one KV group and rotary kind,
    but for the two caches."""

    cos: torch.Tensor  # [T, rotary_dim / 2]
    sin: torch.Tensor
    slot_mapping: torch.Tensor  # [T]
    plan: Any  # the backend's
    key_cache: torch.Tensor  # [num_blocks, block_size, K, D]
    value_cache: torch.Tensor


class Attention:
    """Projections, optional norms of each head's query and key (Qwen3, Gemma 3), rotary, attention."""

    def __init__(
        self,
        kernels: Kernels,
        spec: ModelSpec,
        qkv: Linear,
        output: Linear,
        query_norm: RMSNorm | None = None,
        key_norm: RMSNorm | None = None,
    ) -> None:
        self._kernels = kernels
        self._qkv = qkv
        self._output = output
        self._query_norm = query_norm
        self._key_norm = key_norm
        self._num_heads = spec.num_heads
        self._num_kv_heads = spec.num_kv_heads
        self._head_dim = spec.head_dim
        self._scale = spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
        self._softcap = spec.attention_softcap

    def __call__(self, x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """x [T, H] -> [T, H]; writes the tokens' keys and values into the cache first."""
        kernels = self._kernels
        heads = self._qkv(x).view(len(x), -1, self._head_dim)
        query, key, value = heads.split([self._num_heads, self._num_kv_heads, self._num_kv_heads], dim=1)
        if self._query_norm is not None and self._key_norm is not None:
            query, key = self._query_norm(query), self._key_norm(key)
        query = kernels.rotate_and_store(
            query, key, value, context.cos, context.sin, context.key_cache, context.value_cache, context.slot_mapping
        )
        attended = kernels.paged_attention(
            query, context.key_cache, context.value_cache, context.plan, self._scale, self._softcap
        )
        return self._output(attended)
