"""How many tokens a step may compute while others decode: fixed, or by the time a step may take.

Sarathi-Serve (arXiv 2403.02310, section 4.3) profiles the largest batch whose step stays within the time between
tokens; here the profile is fitted to the steps themselves as they run, and so follows load and context.
"""

from __future__ import annotations

from typing import Protocol

from pelton.core.batch import ScheduledBatch
from pelton.engine.least_squares import solve_chosen

# Prompts go on by this many tokens a step, however slow steps are (law 6).
MIN_CHUNK = 16
# Part of the allowed time that is planned for: what lies between two steps takes some, and fits err.
TARGET = 0.9
# Weight of a step in the fit relative to the one after it; the fit remembers about 1 / (1 - MEMORY) steps.
MEMORY = 0.98
_SCALE = (1.0, 1 / 32, 1 / 256)  # of the fit's inputs: a step, its decodes, its other tokens
_RIDGE = 1e-3


class StepBudget(Protocol):
    def num_tokens(self, num_decodes: int) -> int:
        """Most tokens of a step in which `num_decodes` requests get their next one."""
        ...

    def observe(self, batch: ScheduledBatch, elapsed_s: float) -> None:
        """A step took `elapsed_s`."""
        ...

    def time_s(self, batch: ScheduledBatch) -> float:
        """Seconds that a step will take, as far as is known; 0.0 before anything was observed."""
        ...


class StepTimes:
    """Time of a step by least squares over recent ones: a + b * decodes + c * other tokens, none of them negative."""

    def __init__(self) -> None:
        self._moments = [[_RIDGE * (row == column) for column in range(3)] for row in range(3)]
        self._products = [0.0, 0.0, 0.0]
        self._seconds: tuple[float, ...] | None = None
        self.largest_chunk = float(MIN_CHUNK)  # seen lately: the fit is not to be trusted far beyond

    def observe(self, batch: ScheduledBatch, elapsed_s: float) -> None:
        num_decodes, num_others = _count_tokens(batch)
        values = [value * scale for value, scale in zip((1, num_decodes, num_others), _SCALE, strict=True)]
        for row in range(3):
            for column in range(3):
                fresh = values[row] * values[column] + (1 - MEMORY) * _RIDGE * (row == column)
                self._moments[row][column] = MEMORY * self._moments[row][column] + fresh
            self._products[row] = MEMORY * self._products[row] + values[row] * elapsed_s
        self.largest_chunk = max(MIN_CHUNK, MEMORY * self.largest_chunk, num_others)
        self._seconds = None

    def time_s(self, batch: ScheduledBatch) -> float:
        num_decodes, num_others = _count_tokens(batch)
        step_s, decode_s, token_s = self.seconds
        return step_s + decode_s * num_decodes + token_s * num_others

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of a step, of a decode, of another token."""
        if self._seconds is None:
            self._seconds = self._fit()
        return self._seconds

    def _fit(self) -> tuple[float, ...]:
        """A negative coefficient is left out and the rest fitted again."""
        kept = [0, 1, 2]
        while kept and (solution := solve_chosen(self._moments, self._products, kept)) is not None:
            worst = min(kept, key=solution.__getitem__)
            if solution[worst] >= 0:
                return tuple(value * scale for value, scale in zip(solution, _SCALE, strict=True))
            kept.remove(worst)
        return (0.0, 0.0, 0.0)


class FixedBudget(StepTimes):
    def __init__(self, max_num_tokens: int) -> None:
        super().__init__()
        self._max_num_tokens = max_num_tokens

    def num_tokens(self, num_decodes: int) -> int:  # noqa: ARG002
        return self._max_num_tokens


class TimeBudget(StepTimes):
    """As many prompt tokens beside the decodes as fit into `step_s`.

    A step without decodes delays nobody's next token and may have `max_num_tokens`.
    """

    def __init__(self, step_s: float, max_num_tokens: int) -> None:
        super().__init__()
        self._step_s = step_s
        self._max_num_tokens = max_num_tokens

    def num_tokens(self, num_decodes: int) -> int:
        if num_decodes == 0:
            return self._max_num_tokens
        step_s, decode_s, token_s = self.seconds
        left_s = TARGET * self._step_s - step_s - decode_s * num_decodes
        most = 2 * self.largest_chunk
        chunk = min(left_s / token_s, most) if token_s > 0 else most
        return min(self._max_num_tokens, num_decodes + max(MIN_CHUNK, int(chunk)))


def _count_tokens(batch: ScheduledBatch) -> tuple[int, int]:
    """Decodes, and tokens of requests that compute more than one."""
    counts = [len(scheduled[1]) for scheduled in batch.requests]
    num_decodes = counts.count(1)
    return num_decodes, sum(counts) - num_decodes


def make_budget(tpot_slo_ms: float | None, max_num_tokens: int) -> StepBudget:
    """By time where one is given, else fixed."""
    return FixedBudget(max_num_tokens) if tpot_slo_ms is None else TimeBudget(tpot_slo_ms / 1e3, max_num_tokens)
