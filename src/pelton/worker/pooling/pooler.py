"""What a pooling method does with the hidden states of a request, chunk by chunk.

Law 3: the result is a function of the hidden states alone, bit for bit, however they were cut into chunks.

Legend: C tokens of the chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from pelton.core.pooling import PoolingParams
from pelton.worker.forward_batch import Floats


class Pooler(ABC):
    """Of one request."""

    reads_logits = False  # whether `finish` is given the logits of the last token

    def __init__(self, params: PoolingParams) -> None:
        self.params = params
        self.num_tokens = 0  # that came so far

    def add(self, hidden: Floats) -> None:
        """The hidden states [C, H] of the next tokens; their memory is another's afterwards."""
        self.take(hidden)
        self.num_tokens += len(hidden)

    def finish(self, logits: Floats | None) -> Floats:
        """The result, after the last token's chunk: cut, then scaled to length 1 where that is wanted."""
        values = self.result(logits)[: self.params.dimensions]
        if not self.params.normalize:
            return values.astype(np.float32)
        length = float(np.sqrt(np.square(values, dtype=np.float64).sum()))
        return (values / max(length, 1e-12)).astype(np.float32)

    @abstractmethod
    def take(self, hidden: Floats) -> None: ...

    @abstractmethod
    def result(self, logits: Floats | None) -> Floats: ...
