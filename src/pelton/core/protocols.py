"""Where the rooms meet: small protocols, implemented elsewhere, joined in `build.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from pelton.core.batch import BlockKey, ScheduledBatch, StepResult
from pelton.core.events import TenantStats
from pelton.core.lora import LoraAdapter
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
    """Order of the waiting, victim among the running, charge for service. One file each in `policies/`.

    A request's way: `add`, then `admit` (and `preempt`, `admit` again, any number of times), then `finish`.
    """

    def add(self, request: Request) -> None:
        """`request` is new and starts to wait."""
        ...

    def waiting(self) -> Iterable[Request]:
        """The waiting that may run now, best first; those whose tenant is at a cap are left out.

        Between two steps of the iteration the request just given may be admitted, no other: a policy that
        charges at admission gives the next one by the new balance.
        """
        ...

    def __len__(self) -> int:
        """Number of the waiting, those at a cap included."""
        ...

    def admit(self, request: Request, num_cached_tokens: int) -> None:
        """`request` leaves the waiting and runs; `num_cached_tokens` of its tokens need no computing."""
        ...

    def order(self, running: list[Request]) -> None:
        """Sort running requests that want more than one token (prompts, recompute): who gets its chunk first."""
        ...

    def precedes(self, waiting: Request, running: Request) -> bool:
        """Whether `waiting`, the first in order, gets tokens of a step before the next chunk of `running`."""
        ...

    def narrow(self, num_tokens: int) -> int:
        """Of `num_tokens` that the next step has room for beside its decodes, how many may be computed."""
        ...

    def preempt(self, request: Request) -> None:
        """`request` was running, has given up its KV and waits again. It is not a new arrival."""
        ...

    def finish(self, request: Request) -> None:
        """`request` has ended, waiting or running: its `status` is still what it was."""
        ...

    def choose_victim(self, running: Sequence[Request], beneficiary: Request) -> Request | None:
        """Which of `running` gives up its KV so that `beneficiary` can go on.

        None: nobody should yield to it, so it is the one to be preempted. The scheduler offers only
        requests that have made progress since they were last preempted (no thrash).
        """
        ...

    def charge_prefill(self, request: Request, num_tokens: int) -> None:
        """Prompt tokens are about to be computed; those found in the cache or computed again are not told."""
        ...

    def charge(self, tenant_id: str, num_output_tokens: int) -> None:
        """Tokens have been sampled for requests of a tenant, which has some."""
        ...

    def charge_kv(self, tenant_id: str, num_block_seconds: float) -> None:
        """Account for KV that is held without a running request (pins): blocks times seconds."""
        ...

    def settings_changed(self, tenant_id: str) -> None:
        """A tenant's weight or caps are others now."""
        ...

    def tenant_stats(self) -> tuple[TenantStats, ...]:
        """Of the tenants that have requests, or had some and are remembered."""
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


@dataclass(frozen=True, slots=True)
class BlockRead:
    """Which blocks of a read have come, and how long it took; the rest are missing, damaged or another's."""

    loaded: tuple[bool, ...]
    elapsed_s: float


class BlockStore(Protocol):
    """Keeps blocks outside of memory; moves them from and to blocks of host memory on threads of its own.

    A host block stays untouched by others until the future that names it is done. Futures hold no
    exception: what goes wrong is a block that is not stored, or not loaded.
    """

    def scan(self, max_bytes: int) -> list[BlockKey]:
        """What is there already, oldest first; called once, ahead of everything else."""
        ...

    @property
    def file_bytes(self) -> int:
        """What one block takes."""
        ...

    def store(self, slot_id: int, key: BlockKey) -> Future[bool]: ...

    def load(self, slot_ids: Sequence[int], keys: Sequence[BlockKey]) -> Future[BlockRead]: ...

    def remove(self, keys: Sequence[BlockKey]) -> None: ...

    def close(self) -> None:
        """End what is being moved; what waits is dropped."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class WantedBlocks:
    """Blocks that another engine asks for, the first of a chain first."""

    keys: tuple[BlockKey, ...]
    # Outbox slots that hold the first so many of them; set by the engine.
    offer: Future[tuple[int, ...]] = field(default_factory=Future)
    # Set by the connector: the other engine has read them, or will not.
    taken: Future[None] = field(default_factory=Future)


class KVConnector(Protocol):
    """Moves blocks between this engine and others, through memory of its own, on threads of its own.

    Slots of the outbox are read by other engines, those of the inbox are filled from theirs. The engine says which
    slot is whose, and has them written and read by operations of a step; see `engine/kv/transfer.py`.
    """

    @property
    def inbox(self) -> Any:
        """Bytes [num_slots, block_bytes]: a numpy array, or a tensor where blocks stay on a device."""
        ...

    @property
    def outbox(self) -> Any: ...

    @property
    def can_fetch(self) -> bool:
        """Whether there is an engine to ask, as far as is known."""
        ...

    def fetch(self, slot_ids: Sequence[int], keys: Sequence[BlockKey]) -> Future[BlockRead]:
        """Bring blocks from other engines into the inbox; done within bounded time, and never with an exception."""
        ...

    def take_wanted(self) -> list[WantedBlocks]:
        """What others have asked for since the last call."""
        ...

    def wake_with(self, wake: Callable[[], None]) -> None:
        """`wake` is called, on threads of the connector, when `take_wanted` has something to give."""
        ...

    def close(self) -> None:
        """End what is being moved, and free the memory."""
        ...


class AdapterStore(Protocol):
    """Keeps LoRA adapters in the worker's memory; requests name them by `lora_id`."""

    def load(self, path: str) -> Future[LoraAdapter]:
        """Read an adapter's files on a thread of its own. The future fails with a `PeltonError`."""
        ...

    def remove(self, lora_id: str) -> None:
        """Free one that no step names any more."""
        ...


class WorkerStores(Protocol):
    """What of a worker the control plane uses beside its steps; None: it has none."""

    @property
    def block_store(self) -> BlockStore | None: ...

    @property
    def adapters(self) -> AdapterStore | None: ...

    @property
    def connector(self) -> KVConnector | None: ...


class KVCompressor(Protocol):
    """Shrinks KV; its identity is part of every block hash (law 5)."""

    @property
    def identity(self) -> str: ...
