"""Where the rooms meet: small protocols, implemented elsewhere, joined in `build.py`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Protocol

from pelton.core.batch import ScheduledBatch, StepResult
from pelton.core.request import Request


class Clock(Protocol):
    def now_s(self) -> float:
        """Monotonic seconds. The simulator's clock only moves when a step is executed."""
        ...


class MonotonicClock:
    """The real clock; comparable across processes of one host."""

    def now_s(self) -> float:
        return time.monotonic()


class Executor(Protocol):
    """Runs steps in the order they were submitted; at most a few are in flight."""

    def submit(self, batch: ScheduledBatch) -> Future[StepResult]:
        """Queue one step. The future fails with the exception that broke the step."""
        ...

    def close(self) -> None:
        """Finish what is in flight and release threads and memory."""
        ...


class SchedulingPolicy(Protocol):
    """Order of the waiting, victim among the running, charge for tokens. One file each in `policies/`."""

    def add(self, request: Request) -> None:
        """`request` starts to wait (new, or preempted)."""
        ...

    def remove(self, request: Request) -> None:
        """`request` leaves the waiting: admitted or cancelled."""
        ...

    def waiting(self) -> Iterable[Request]:
        """The waiting, best first. Not changed while iterated."""
        ...

    def __len__(self) -> int: ...

    def choose_victim(self, running: Sequence[Request], beneficiary: Request) -> Request | None:
        """Which of `running` gives up its KV so that `beneficiary`, one of them, can go on.

        None, or `beneficiary` itself: nobody should yield to it, so it is the one to be preempted.
        """
        ...

    def charge(self, request: Request, num_prefill_tokens: int, num_output_tokens: int) -> None:
        """Account for computed tokens."""
        ...


class TokenDecoder(Protocol):
    """The engine's view of a tokenizer: ids to bytes. Ids beyond the vocabulary give b""."""

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes, possibly part of a character, that the token adds in mid-text."""
        ...

    def is_special(self, token_id: int) -> bool:
        """True for control tokens, which `skip_special_tokens` leaves out of the text."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end a generation unless `ignore_eos`."""
        ...


class Proposer(Protocol):
    """Drafts tokens for speculative verification."""

    def propose(self, request: Request, num_tokens: int) -> list[int]: ...


class KVConnector(Protocol):
    """Moves blocks between the device and a tier or another engine."""

    def load(self, block_ids: Sequence[int], block_hashes: Sequence[bytes]) -> Future[None]: ...

    def store(self, block_ids: Sequence[int], block_hashes: Sequence[bytes]) -> Future[None]: ...


class KVCompressor(Protocol):
    """Shrinks KV; its identity is part of every block hash (law 5)."""

    @property
    def identity(self) -> str: ...
