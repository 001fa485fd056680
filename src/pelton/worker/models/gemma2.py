"""Gemma 2: norms before and after each half of a layer, soft caps, every other layer with a window."""

from __future__ import annotations

import torch

from pelton.worker.layers.attention import AttentionContext
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

    def __call__(self, hidden: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        attended = self._attention_norm(self._attention(self._input_norm(hidden), context))
        normed, hidden = self._mlp_input_norm.add(attended, hidden)
        return self._mlp_norm(self._mlp(normed)).add_(hidden)


class Gemma2Model(DecoderModel):
    norm_offset = 1.0

    def make_layer(self, parts: ModelParts, prefix: str) -> DecoderLayer:
        return GemmaLayer(parts, prefix)
