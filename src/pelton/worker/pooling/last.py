"""The last token's hidden state: what decoder models that were trained for embeddings answer with."""

from __future__ import annotations

from pelton.worker.forward_batch import Floats
from pelton.worker.pooling.pooler import Pooler


class LastPooler(Pooler):
    def take(self, hidden: Floats) -> None:
        self._last = hidden[-1].copy()

    def result(self, logits: Floats | None) -> Floats:  # noqa: ARG002
        return self._last
