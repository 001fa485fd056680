"""BPE merges from a SentencePiece vocabulary, which stores pieces and scores but no merges."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeAlias

Merges: TypeAlias = list[tuple[str, str]]


def order_of_scores(scores: Sequence[float]) -> list[int]:
    """Token ids, best score first; ties keep the order of ids."""
    return sorted(range(len(scores)), key=lambda token_id: -scores[token_id])


def derive_merges(token_ids: dict[str, int], order: Sequence[int] | None, apart: Collection[str]) -> Merges:
    """Every way to join two pieces into a third, in the order in which BPE should prefer the third.

    `token_ids` is in the order of its ids; `order` lists ids best first (None: by id). Among the ways
    to make one piece, the longer left half goes first. No merge makes a piece of `apart`.
    """
    pieces = list(token_ids)
    if order is not None:
        pieces = [pieces[token_id] for token_id in order]
    merges: Merges = []
    append = merges.append
    for piece in pieces:
        if piece in apart:
            continue
        for cut in range(len(piece) - 1, 0, -1):
            left = piece[:cut]
            if left in token_ids and (right := piece[cut:]) in token_ids:
                append((left, right))
    return merges
