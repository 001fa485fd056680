"""Words of several tokens that must not be written: their last token is banned once the others stand there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pelton.worker.sampling.sampler import TokenMask


class BannedSequences:
    """Of one request. Looks at its output alone: what the prompt says is no part of a word."""

    def __init__(self, sequences: Sequence[tuple[int, ...]], vocab_size: int) -> None:
        self._sequences = [(list(sequence[:-1]), sequence[-1]) for sequence in sequences]
        self._num_words = -(-vocab_size // 32)

    def narrow(self, mask: TokenMask | None, output_token_ids: list[int]) -> TokenMask | None:
        """`mask` without the tokens that would end a sequence now; it is copied, not changed."""
        num_outputs = len(output_token_ids)
        banned = [
            last
            for start, last in self._sequences
            if num_outputs >= len(start) and output_token_ids[num_outputs - len(start) :] == start
        ]
        if not banned:
            return mask
        narrowed = np.full(self._num_words, 2**32 - 1, np.uint32) if mask is None else mask.copy()
        for token_id in banned:
            narrowed[token_id // 32] &= np.uint32(~(1 << token_id % 32) & 0xFFFFFFFF)
        return narrowed
