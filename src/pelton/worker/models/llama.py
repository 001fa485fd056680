"""Llama 2 and 3: norm before each half of a layer, grouped queries, SwiGLU."""

from __future__ import annotations

import torch

from pelton.worker.layers.attention import AttentionContext
from pelton.worker.models.decoder import DecoderLayer, DecoderModel
from pelton.worker.models.model_parts import ModelParts


class LlamaLayer:
    def __init__(self, parts: ModelParts, prefix: str, *, head_norms: bool = False) -> None:
        self._input_norm = parts.norm(f"{prefix}.input_layernorm")
        self._attention = parts.attention(f"{prefix}.self_attn", head_norms=head_norms)
        self._mlp_norm = parts.norm(f"{prefix}.post_attention_layernorm")
        self._mlp = parts.mlp(f"{prefix}.mlp")

    def __call__(self, hidden: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        attended = self._attention(self._input_norm(hidden), context)
        normed, hidden = self._mlp_norm.add(attended, hidden)
        return self._mlp(normed).add_(hidden)


class LlamaModel(DecoderModel):
    def make_layer(self, parts: ModelParts, prefix: str) -> DecoderLayer:
        return LlamaLayer(parts, prefix)
