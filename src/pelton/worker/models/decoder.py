"""What all decoder-only models share: embedding, layers, last norm, head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from pelton.core.model_spec import ModelSpec
from pelton.worker.kernels.ops import Array, AttentionContext, Kernels, Ops
from pelton.worker.models.model_parts import ModelParts


class DecoderLayer(Protocol):
    def __call__(self, ops: Ops, x: Array, residual: Array | None, context: AttentionContext) -> tuple[Array, Array]:
        """(x [T, H], residual [T, H]) of the stream x + residual, both of which may be overwritten, and again
        such a pair: the sum is left to the next norm. Before the first layer there is no residual."""
        ...


class DecoderModel(ABC):
    """Implements `registry.Model`; an architecture says what a layer is."""

    norm_offset = 0.0

    def __init__(self, parts: ModelParts) -> None:
        parts.norm_offset = self.norm_offset
        self.spec: ModelSpec = parts.spec
        self.kernels: Kernels = parts.kernels
        # The largest matrix first: while it is repacked, it is in memory twice, and nothing else is.
        self._head = parts.lm_head()
        self._embedding = parts.embedding()
        self._layers = [self.make_layer(parts, f"model.layers.{i}") for i in range(self.spec.num_layers)]
        self._norm = parts.norm("model.norm")
        self.lora_sites = tuple(parts.lora_sites)

    @abstractmethod
    def make_layer(self, parts: ModelParts, prefix: str) -> DecoderLayer:
        """Layer whose tensors' names start with `prefix`."""

    def forward(self, ops: Ops, token_ids: Array, contexts: Sequence[AttentionContext]) -> Array:
        """Hidden states [T, H] after the last norm; see `ops.Forward`."""
        x, residual = self._embedding(ops, token_ids), None
        for layer, context in zip(self._layers, contexts, strict=True):
            x, residual = layer(ops, x, residual, context)
        return self._norm.add(ops, x, residual)[0]

    def compute_logits(self, ops: Ops, hidden: Array) -> Array:
        return self._head(ops, hidden)
