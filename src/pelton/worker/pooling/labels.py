"""The logits of a few tokens after the prompt: how rerankers that were taught to say yes or no are read."""

from __future__ import annotations

from pelton.worker.forward_batch import Floats
from pelton.worker.pooling.pooler import Pooler


class LabelsPooler(Pooler):
    reads_logits = True

    def take(self, hidden: Floats) -> None:
        pass

    def result(self, logits: Floats | None) -> Floats:
        assert logits is not None
        return logits[list(self.params.label_token_ids)]
