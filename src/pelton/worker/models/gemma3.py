"""Gemma 3: Gemma 2's layers with norms on each head's query and key instead of soft caps; windowed
layers have a rotary embedding of their own (`ModelSpec.rope_local`)."""

from __future__ import annotations

from pelton.worker.models.decoder import DecoderLayer, DecoderModel
from pelton.worker.models.gemma2 import GemmaLayer
from pelton.worker.models.model_parts import ModelParts


class Gemma3Model(DecoderModel):
    norm_offset = 1.0

    def make_layer(self, parts: ModelParts, prefix: str) -> DecoderLayer:
        return GemmaLayer(parts, prefix, head_norms=True)
