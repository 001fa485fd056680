"""Self-attention over the paged cache."""

from __future__ import annotations

from pelton.core.model_spec import ModelSpec
from pelton.worker.kernels.ops import Array, AttentionContext, Ops
from pelton.worker.layers.linear import Linear, Product
from pelton.worker.layers.norm import RMSNorm


class Attention:
    """Projections, optional norms of each head's query and key (Qwen3, Gemma 3), rotary, attention."""

    def __init__(
        self,
        spec: ModelSpec,
        qkv: Linear,
        output: Product,
        query_norm: RMSNorm | None = None,
        key_norm: RMSNorm | None = None,
    ) -> None:
        self._qkv = qkv
        self._output = output
        self._query_norm = query_norm
        self._key_norm = key_norm
        self._num_heads = spec.num_heads
        self._num_kv_heads = spec.num_kv_heads
        self._scale = spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
        self._softcap = spec.attention_softcap

    def __call__(self, ops: Ops, x: Array, context: AttentionContext) -> Array:
        """x [T, H] -> [T, H]; writes the tokens' keys and values into the cache first."""
        query, key, value = ops.split_heads(self._qkv(ops, x), self._num_heads, self._num_kv_heads)
        if self._query_norm is not None and self._key_norm is not None:
            query, key = self._query_norm(ops, query), self._key_norm(ops, key)
        key_cache, value_cache = context.key_cache, context.value_cache
        query = ops.rotate_and_store(
            query, key, value, context.cos, context.sin, key_cache, value_cache, context.slot_mapping
        )
        attended = ops.paged_attention(query, key_cache, value_cache, context.plan, self._scale, self._softcap)
        return self._output(ops, attended)
