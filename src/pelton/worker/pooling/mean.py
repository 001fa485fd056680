"""The mean of all tokens' hidden states."""

from __future__ import annotations

import numpy as np

from pelton.worker.forward_batch import Floats
from pelton.worker.pooling.pooler import Pooler


class MeanPooler(Pooler):
    def take(self, hidden: Floats) -> None:
        if not self.num_tokens:
            self._sum = np.zeros(hidden.shape[1])
        for row in hidden:  # one by one: a sum over a chunk would depend on where it was cut
            self._sum += row

    def result(self, logits: Floats | None) -> Floats:  # noqa: ARG002
        return (self._sum / self.num_tokens).astype(np.float32)
