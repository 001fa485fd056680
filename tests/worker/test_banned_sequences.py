"""Words of several tokens are never completed, and nothing else is taken away."""

from __future__ import annotations

import numpy as np

from pelton.worker.sampling.banned_sequences import BannedSequences


def banned_ids(mask: np.ndarray | None, vocab_size: int = 70) -> list[int]:
    if mask is None:
        return []
    allowed = np.unpackbits(mask.view(np.uint8), count=vocab_size, bitorder="little")
    return [int(token_id) for token_id in np.flatnonzero(allowed == 0)]


def test_only_the_token_that_completes_a_word_is_banned() -> None:
    banned = BannedSequences([(3,), (5, 6, 65), (6, 7)], 70)
    for outputs, expected in (([], [3]), ([5], [3]), ([5, 6], [3, 7, 65]), ([5, 6, 1], [3]), ([1, 5, 6], [3, 7, 65])):
        assert banned_ids(banned.narrow(None, outputs)) == expected


def test_a_grammars_mask_is_narrowed_and_left_alone() -> None:
    mask = np.array([0b1100, 0, 0], np.uint32)
    narrowed = BannedSequences([(2,)], 70).narrow(mask, [])
    assert narrowed is not None
    assert list(narrowed) == [0b1000, 0, 0]
    assert list(mask) == [0b1100, 0, 0]
    assert BannedSequences([(1, 2)], 70).narrow(mask, [9]) is mask
