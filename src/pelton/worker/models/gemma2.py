"""Gemma 2: norms before and after each half of a layer, soft caps, every other layer with a window."""

from __future__ import annotations

from pelton.worker.kernels.ops import Array, AttentionContext, Ops
from pelton.worker.models.decoder import DecoderLayer, DecoderModel
from pelton.worker.models.model_parts import ModelParts


class GemmaLayer:
    def __init__(self, parts: ModelParts, prefix: str, *, head_norms: bool = False) -> None:
        self._input_norm = parts.norm(f"{prefix}.input_layernorm")
        self._attention = parts.attention(f"{prefix}.self_attn", head_norms=head_norms)
        self._attention_norm = parts.norm(f"{prefix}.post_attention_layernorm")
        self._mlp_input_norm = parts.norm(f"{prefix}.pre_feedforward_layernorm")
        self._mlp = parts.mlp(f"{prefix}.mlp")
        self._mlp_norm = parts.norm(f"{prefix}.post_feedforward_layernorm")

    def __call__(self, ops: Ops, x: Array, residual: Array | None, context: AttentionContext) -> tuple[Array, Array]:
        x, residual = self._input_norm.add(ops, x, residual)
        x = self._attention_norm(ops, self._attention(ops, x, context))
        x, residual = self._mlp_input_norm.add(ops, x, residual)
        return self._mlp_norm(ops, self._mlp(ops, x)), residual


class Gemma2Model(DecoderModel):
    norm_offset = 1.0

    def make_layer(self, parts: ModelParts, prefix: str) -> DecoderLayer:
        return GemmaLayer(parts, prefix)
