"""Llama 2 and 3: norm before each half of a layer, grouped queries, SwiGLU."""

from __future__ import annotations

from pelton.worker.kernels.ops import Array, AttentionContext, Ops
from pelton.worker.models.decoder import DecoderLayer, DecoderModel
from pelton.worker.models.model_parts import ModelParts


class LlamaLayer:
    def __init__(self, parts: ModelParts, prefix: str, *, head_norms: bool = False) -> None:
        self._input_norm = parts.norm(f"{prefix}.input_layernorm")
        self._attention = parts.attention(f"{prefix}.self_attn", head_norms=head_norms)
        self._mlp_norm = parts.norm(f"{prefix}.post_attention_layernorm")
        self._mlp = parts.mlp(f"{prefix}.mlp")

    def __call__(self, ops: Ops, x: Array, residual: Array | None, context: AttentionContext) -> tuple[Array, Array]:
        x, residual = self._input_norm.add(ops, x, residual)
        x, residual = self._mlp_norm.add(ops, self._attention(ops, x, context), residual)
        return self._mlp(ops, x), residual


class LlamaModel(DecoderModel):
    def make_layer(self, parts: ModelParts, prefix: str) -> DecoderLayer:
        return LlamaLayer(parts, prefix)
