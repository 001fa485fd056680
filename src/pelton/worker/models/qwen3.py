"""Qwen3: Llama's layers with a norm on each head's query and key."""

from __future__ import annotations

from pelton.worker.models.decoder import DecoderLayer, DecoderModel
from pelton.worker.models.llama import LlamaLayer
from pelton.worker.models.model_parts import ModelParts


class Qwen3Model(DecoderModel):
    def make_layer(self, parts: ModelParts, prefix: str) -> DecoderLayer:
        return LlamaLayer(parts, prefix, head_norms=True)
