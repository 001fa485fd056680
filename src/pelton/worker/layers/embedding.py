"""Token ids in, logits out."""

from __future__ import annotations

from typing import Any

from pelton.worker.kernels.ops import Array, Ops
from pelton.worker.layers.linear import Product


class TokenEmbedding:
    """On a CPU the table stays packed, as the file holds it: for the 0.5B model 145 MB of shared file pages
    instead of 545 MB of float32, whether or not the head uses the same weights."""

    def __init__(self, table: Any, scale: float) -> None:
        self._table = table
        self._scale = scale

    def __call__(self, ops: Ops, token_ids: Array) -> Array:
        """token_ids [T] -> [T, H]."""
        return ops.embedding(token_ids, self._table, self._scale)


class LMHead:
    def __init__(self, linear: Product, softcap: float | None) -> None:
        self._linear = linear
        self._softcap = softcap

    def __call__(self, ops: Ops, hidden: Array) -> Array:
        """hidden [S, H] -> logits [S, V]."""
        logits = self._linear(ops, hidden)
        return logits if self._softcap is None else ops.softcap(logits, self._softcap)
