"""Steps that are more than memory holds, computed in pieces: law 3 says that nobody can tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pelton.core.batch import ScheduledRequest
from pelton.worker.request_state import RequestState

# Steps after which more is tried again: what took the memory may have gone.
_STEPS_UNTIL_MORE = 256
OUT_OF_MEMORY = "the device had no memory left to compute the request's tokens; a smaller KV cache leaves it more"


@dataclass(slots=True)
class StepRow:
    """One request that runs in this step."""

    index: int  # in ScheduledBatch.requests
    scheduled: ScheduledRequest
    state: RequestState
    token_ids: tuple[int, ...]
    adapter: Any = None  # in the kernels' layout

    @property
    def samples(self) -> bool:
        return self.scheduled.samples and self.state.pooler is None

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.scheduled.num_computed_tokens + len(self.token_ids)


class StepLimit:
    """How many tokens are computed at once: as many as are asked for, until they do not fit."""

    def __init__(self) -> None:
        self._most: int | None = None
        self._num_steps = 0  # since it last changed

    def begin_step(self) -> None:
        self._num_steps += 1
        if self._most is not None and self._num_steps > _STEPS_UNTIL_MORE:
            self._most, self._num_steps = 2 * self._most, 0

    def holds(self, num_tokens: int) -> bool:
        return self._most is None or num_tokens <= self._most

    def failed(self, num_tokens: int) -> None:
        self._most = max(1, num_tokens // 2) if self._most is None else min(self._most, max(1, num_tokens // 2))
        self._num_steps = 0


def num_tokens_of(rows: Sequence[StepRow]) -> int:
    return sum(len(row.token_ids) for row in rows)


def halves(rows: Sequence[StepRow]) -> tuple[list[StepRow], list[StepRow]]:
    """Half of the tokens each, of two at least; a request that lies across is cut in two, of which the last samples."""
    first: list[StepRow] = []
    room = num_tokens_of(rows) // 2
    for place, row in enumerate(rows):
        count = len(row.token_ids)
        if count > room:
            if not room:
                return first, list(rows[place:])
            return [*first, _part(row, 0, room)], [_part(row, room, count), *rows[place + 1 :]]
        first.append(row)
        room -= count
    raise ValueError("there is nothing to halve")


def _part(row: StepRow, start: int, end: int) -> StepRow:
    scheduled = row.scheduled._replace(
        token_ids=row.scheduled.token_ids[start:end],
        num_computed_tokens=row.scheduled.num_computed_tokens + start,
        samples=row.scheduled.samples and end == len(row.token_ids),
    )
    return replace(row, scheduled=scheduled, token_ids=row.token_ids[start:end])
