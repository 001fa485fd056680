"""What a pull tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class PullPhase(StrEnum):
    WAITING = "waiting"  # another pull of the same model holds the lock
    CONNECTING = "connecting"
    DOWNLOADING = "downloading"
    VERIFYING = "verifying"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class PullProgress:
    """A snapshot, not a difference. `source` says in words where the bytes come from.

    `total_bytes` is None where the source does not tell. `num_bytes` may fall back when a mirror
    fails and the next one starts.
    """

    name: str
    phase: PullPhase
    source: str = ""
    num_bytes: int = 0
    total_bytes: int | None = None


ProgressCallback = Callable[[PullProgress], None]


def no_progress(progress: PullProgress) -> None:
    """For callers that do not watch."""
