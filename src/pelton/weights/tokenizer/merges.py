"""BPE merges from a SentencePiece vocabulary, which stores pieces and scores but no merges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

Merges: TypeAlias = list[tuple[str, str]]


def ranks_from_scores(scores: Sequence[float]) -> list[int]:
    """Token ids, best score first; ties keep the order of ids."""
    return sorted(range(len(scores)), key=lambda token_id: -scores[token_id])


def derive_merges(token_ids: dict[str, int], order: Sequence[int] | None, unreachable: frozenset[int]) -> Merges:
    """Every way to join two pieces into a third, in the order in which BPE should prefer the third.

    `order` lists the token ids best first (None: by id). Among the ways to make one piece, the
    longer left half goes first. `unreachable` ids (control and byte tokens) are never made from text.
    """
    pieces = list(token_ids)
    merges: Merges = []
    append = merges.append
    for token_id in range(len(pieces)) if order is None else order:
        piece = pieces[token_id]
        if token_id in unreachable:
            continue
        for cut in range(len(piece) - 1, 0, -1):
            left = piece[:cut]
            if left in token_ids and (right := piece[cut:]) in token_ids:
                append((left, right))
    return merges
