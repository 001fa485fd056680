"""What all decoder-only models share: embedding, layers, last norm, head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch

from pelton.core.model_spec import ModelSpec
from pelton.worker.forward_batch import ForwardBatch
from pelton.worker.kernels.ops import AttentionShape
from pelton.worker.kv_storage import KVStorage
from pelton.worker.layers.attention import AttentionContext
from pelton.worker.layers.rotary import RotaryTable
from pelton.worker.models.model_parts import ModelParts


class DecoderLayer(Protocol):
    def __call__(self, hidden: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """hidden [T, H], which may be overwritten -> [T, H]."""
        ...


class DecoderModel(ABC):
    """Implements `registry.Model`; an architecture says what a layer is."""

    norm_offset = 0.0

    def __init__(self, parts: ModelParts) -> None:
        parts.norm_offset = self.norm_offset
        self.spec: ModelSpec = parts.spec
        self._kernels = parts.kernels
        # The largest matrix first: while it is repacked, it is in memory twice, and nothing else is.
        self._head = parts.lm_head()
        self._embedding = parts.embedding()
        self._layers = [self.make_layer(parts, f"model.layers.{i}") for i in range(self.spec.num_layers)]
        self._norm = parts.norm("model.norm")
        self._rotary = RotaryTable(self.spec.rope)
        self._rotary_local = self._rotary if self.spec.rope_local is None else RotaryTable(self.spec.rope_local)

    @abstractmethod
    def make_layer(self, parts: ModelParts, prefix: str) -> DecoderLayer:
        """Layer whose tensors' names start with `prefix`."""

    def forward(self, batch: ForwardBatch, kv: KVStorage) -> torch.Tensor:
        """Writes the KV of all tokens. Returns hidden states [T, H] after the last norm."""
        contexts = self._contexts(batch, kv)
        hidden = self._embedding(batch.token_ids)
        for layer, context in zip(self._layers, contexts, strict=True):
            hidden = layer(hidden, context)
        return self._norm(hidden)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [S, H] of the rows wanted -> [S, V] float32."""
        return self._head(hidden)

    def _contexts(self, batch: ForwardBatch, kv: KVStorage) -> list[AttentionContext]:
        """One per layer; whatever layers have in common is made once."""
        spec = self.spec
        num_positions = max(batch.seq_lens)
        cos_sin = self._rotary.lookup(batch.positions, num_positions)
        local = cos_sin
        if self._rotary_local is not self._rotary:
            local = self._rotary_local.lookup(batch.positions, num_positions)
        shapes = [
            AttentionShape(spec.num_heads, spec.num_kv_heads, spec.head_dim, kv.block_size, group.sliding_window)
            for group in batch.groups
        ]
        plans = [
            self._kernels.plan_attention(shape, batch.query_start_loc, batch.seq_lens, group.block_tables)
            for shape, group in zip(shapes, batch.groups, strict=True)
        ]
        contexts = []
        for layer_id in range(spec.num_layers):
            index = kv.group_of_layer(layer_id)
            group = batch.groups[index]
            cos, sin = cos_sin if group.sliding_window is None else local
            contexts.append(AttentionContext(cos, sin, group.slot_mapping, plans[index], *kv.layer_cache(layer_id)))
        return contexts
