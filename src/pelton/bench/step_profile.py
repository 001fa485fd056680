"""Where the time of a model's step goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pelton.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfilePlan:
    """Steps to profile: one token each of `decode` requests with `context` tokens, and prompts of `prefill` tokens."""

    decode: tuple[int, ...] = (1, 16, 32, 64)
    prefill: tuple[int, ...] = (512,)
    context: int = 256
    budget_s: float = 1.5  # for one kind of step

    def __post_init__(self) -> None:
        if min((*self.decode, *self.prefill, self.context, 1)) < 1:
            raise ConfigError("the sizes of steps must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPart:
    name: str
    num_calls: int
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """One step: of all that were measured, the one whose time is the median. Its parts add up to `time_s`."""

    name: str
    num_requests: int
    num_tokens: int
    time_s: float
    fastest_s: float
    num_steps: int
    parts: tuple[StepPart, ...]


def median_step(name: str, sizes: tuple[int, int], steps: Sequence[tuple[float, tuple[StepPart, ...]]]) -> StepProfile:
    """`sizes`: requests and tokens; `steps`: time and parts of each, the first of which warms up and is left out."""
    ordered = sorted(steps[1:], key=lambda step: step[0])
    time_s, parts = ordered[(len(ordered) - 1) // 2]
    return StepProfile(
        name=name,
        num_requests=sizes[0],
        num_tokens=sizes[1],
        time_s=time_s,
        fastest_s=ordered[0][0],
        num_steps=len(ordered),
        parts=tuple(sorted(parts, key=lambda part: -part.time_s)),
    )
