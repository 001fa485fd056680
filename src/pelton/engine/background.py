"""Background requests (lines of batches): they take what others leave, and one step in a few beside them."""

from __future__ import annotations

from collections.abc import Sequence

from pelton.core.request import Request

# While others have something to compute, one step in so many has tokens of background requests: they go on (law 6),
# and the others' tokens come nearly as fast as without them.
BACKGROUND_TURN = 8


def takers(running: Sequence[Request], num_background: int, num_steps: int) -> Sequence[Request]:
    """Those of `running` that the next step is for; `num_background` of all requests are background ones."""
    if num_background and num_steps % BACKGROUND_TURN:
        others = [request for request in running if not request.is_background and _wants_tokens(request)]
        if others:
            return others
    return tuple(running)


def _wants_tokens(request: Request) -> bool:
    return min(request.num_tokens, request.max_num_tokens - 1) > request.num_computed_tokens
