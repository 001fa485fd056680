"""`PinTable`: KV blocks kept for sessions between their turns; who holds what, until when, and who yields.

A pin names blocks as a request's block table does, so the block ledger counts it (law 4). It ends when its
time is up and nobody waits for it, when a later turn takes over, or when it has to yield:

- to a running request that needs a block, before any request is preempted;
- to the head of the queue, if the pin's program arrived later, or if another tenant pins more than its fair
  share of the cache;
- to anybody, once nothing runs: a cache full of pins still progresses (Continuum's deadlock rule).

Whoever yields, the latest arrived program goes first: those that began early are nearest to their end. What a
tenant pins at once is bounded (`TenantSettings.max_pin_share`), a block that several of its pins share counts
once, and blocks times seconds are charged to it.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count

from pelton.core.protocols import Clock
from pelton.core.request import Request
from pelton.core.tenant import Tenants
from pelton.engine.kv.block_pool import BlockPool


class PinEnd(StrEnum):
    EXPIRED = "expired"  # its time was up
    SUPERSEDED = "superseded"  # the session's next turn holds the blocks, or has left them
    YIELDED = "yielded"  # others needed the memory
    OVER_QUOTA = "over_quota"  # its tenant pinned something better
    DELETED = "deleted"  # its session was deleted or forgotten


@dataclass(slots=True, eq=False, kw_only=True)
class Pin:
    tenant_id: str
    program_arrival_s: float
    block_ids: tuple[int, ...]
    expires_s: float  # on the engine's clock
    is_awaited: bool = False  # the next turn is waiting, so time does not end the pin
    ended: PinEnd | None = None


@dataclass(slots=True)
class _TenantPins:
    pins_by_block: Counter[int] = field(default_factory=Counter)
    num_pins: int = 0
    charged_s: float = 0.0  # up to when its blocks are charged

    @property
    def num_blocks(self) -> int:
        return len(self.pins_by_block)


class PinTable:
    """`charge(tenant_id, num_block_seconds)` hears what pins cost, the policy's `charge_kv` for one."""

    def __init__(self, pool: BlockPool, tenants: Tenants, clock: Clock, charge: Callable[[str, float], None]) -> None:
        self.num_ended: Counter[PinEnd] = Counter()
        self._pool = pool
        self._tenants = tenants
        self._clock = clock
        self._charge = charge
        self._pins: dict[Pin, None] = {}
        self._by_tenant: dict[str, _TenantPins] = {}
        self._expiries: list[tuple[float, int, Pin]] = []  # heap; ended pins leave it late
        self._order = count()
        self._last_refusal: tuple[str, int, bool] | None = None
        self._last_refused_short = 0

    def __len__(self) -> int:
        return len(self._pins)

    def __iter__(self) -> Iterator[Pin]:
        return iter(self._pins)

    def num_blocks(self, tenant_id: str) -> int:
        """Different blocks that a tenant pins."""
        held = self._by_tenant.get(tenant_id)
        return held.num_blocks if held is not None else 0

    def try_pin(self, pin: Pin) -> bool:
        """Hold the pin's blocks, which somebody else must hold at this moment.

        A tenant over its quota loses its own pins, the latest program's first, the new one among them.
        """
        quota = int(self._tenants.of(pin.tenant_id).max_pin_share * self._pool.num_total)
        if not pin.block_ids or not self._make_quota(pin, quota):
            return False
        now_s = self._clock.now_s()
        held = self._by_tenant.setdefault(pin.tenant_id, _TenantPins(charged_s=now_s))
        self._charge_tenant(pin.tenant_id, held, now_s)
        held.pins_by_block.update(pin.block_ids)
        held.num_pins += 1
        self._pool.hold(pin.block_ids)
        self._pins[pin] = None
        heapq.heappush(self._expiries, (pin.expires_s, next(self._order), pin))
        return True

    def _make_quota(self, pin: Pin, quota: int) -> bool:
        """End the tenant's pins that rank behind a new one, until that fits. False, and nothing ended: it cannot."""
        own = [other for other in self._pins if other.tenant_id == pin.tenant_id]
        behind = sorted((other for other in own if _rank(other) >= _rank(pin)), key=_rank)
        staying = {block_id for other in own if _rank(other) < _rank(pin) for block_id in other.block_ids}
        if len(staying.union(pin.block_ids)) > quota:
            return False
        while len(self._blocks_of(pin.tenant_id) | set(pin.block_ids)) > quota:
            self.end(behind.pop(), PinEnd.OVER_QUOTA)
        return True

    def _blocks_of(self, tenant_id: str) -> Set[int]:
        held = self._by_tenant.get(tenant_id)
        return held.pins_by_block.keys() if held is not None else frozenset()

    def end(self, pin: Pin, reason: PinEnd) -> None:
        """Give the blocks back. Does nothing to a pin that has ended."""
        if self._pins.pop(pin, self) is self:
            return
        held = self._by_tenant[pin.tenant_id]
        self._charge_tenant(pin.tenant_id, held, self._clock.now_s())
        for block_id in pin.block_ids:
            held.pins_by_block[block_id] -= 1
            if not held.pins_by_block[block_id]:
                del held.pins_by_block[block_id]
        held.num_pins -= 1
        if not held.num_pins:
            del self._by_tenant[pin.tenant_id]
        self._pool.release(reversed(pin.block_ids))
        pin.ended = reason
        self.num_ended[reason] += 1

    def expire(self) -> None:
        """End the pins whose time is up and whose next turn is not waiting."""
        now_s = self._clock.now_s()
        while self._expiries and self._expiries[0][0] <= now_s:
            _, _, pin = heapq.heappop(self._expiries)
            if not pin.is_awaited:
                self.end(pin, PinEnd.EXPIRED)

    @property
    def next_expiry_s(self) -> float | None:
        while self._expiries and self._expiries[0][2].ended is not None:
            heapq.heappop(self._expiries)
        return self._expiries[0][0] if self._expiries else None

    def stop_awaiting(self, pin: Pin) -> None:
        """The turn that waited for the pin has gone away."""
        pin.is_awaited = False
        if pin.expires_s <= self._clock.now_s():
            self.end(pin, PinEnd.EXPIRED)

    # -- yielding ---------------------------------------------------------------------------------

    def yield_to_running(self, num_blocks: int) -> None:
        """End pins until so many blocks can be allocated, or none is left."""
        while self._pins and self._pool.num_available < num_blocks:
            self.end(max(self._pins, key=_rank), PinEnd.YIELDED)

    def try_yield_to_head(self, head: Request, num_blocks_short: int, *, is_idle: bool) -> bool:
        """End pins for the request that is first in the queue and lacks so many blocks.

        False, and nothing ended: those that have to yield would not be enough. `is_idle`: nothing runs, so
        nobody else will ever give memory back; then all yield, enough or not.
        """
        state = (head.request_id, len(self._pins), is_idle)
        if state == self._last_refusal and num_blocks_short >= self._last_refused_short:
            return False
        beyond_share = self._beyond_share(head.tenant_id)
        yielding = [
            pin
            for pin in self._pins
            if is_idle or pin in beyond_share or pin.program_arrival_s > head.program_arrival_s
        ]
        if not yielding or not (is_idle or self._num_held_alone(yielding) >= num_blocks_short):
            self._last_refusal, self._last_refused_short = state, num_blocks_short
            return False
        yielding.sort(key=lambda pin: (pin in beyond_share, _rank(pin)))
        enough = self._pool.num_available + num_blocks_short
        while yielding and self._pool.num_available < enough:
            self.end(yielding.pop(), PinEnd.YIELDED)
        return True

    def _beyond_share(self, tenant_id: str) -> set[Pin]:
        """Pins of other tenants above their quota divided by those who pin and this tenant."""
        others = self._by_tenant.keys() - {tenant_id}
        found = set()
        for other in others:
            share = self._tenants.of(other).max_pin_share * self._pool.num_total / (len(others) + 1)
            excess = self._by_tenant[other].num_blocks - share
            for pin in sorted((pin for pin in self._pins if pin.tenant_id == other), key=_rank, reverse=True):
                if excess <= 0:
                    break
                found.add(pin)
                excess -= len(pin.block_ids)
        return found

    def _num_held_alone(self, pins: Sequence[Pin]) -> int:
        """Blocks that nobody would hold without these pins."""
        counts = Counter(block_id for pin in pins for block_id in pin.block_ids)
        blocks = self._pool.blocks
        return sum(1 for block_id, number in counts.items() if blocks[block_id].ref_count == number)

    # -- charging ---------------------------------------------------------------------------------

    def charge(self) -> None:
        """Charge what every tenant has pinned since the last time."""
        now_s = self._clock.now_s()
        for tenant_id, held in self._by_tenant.items():
            self._charge_tenant(tenant_id, held, now_s)

    def _charge_tenant(self, tenant_id: str, held: _TenantPins, now_s: float) -> None:
        num_block_seconds = held.num_blocks * (now_s - held.charged_s)
        held.charged_s = now_s
        if num_block_seconds > 0.0:
            self._charge(tenant_id, num_block_seconds)


def _rank(pin: Pin) -> tuple[bool, float]:
    """The highest yields first: one that nobody waits for, of the program that arrived last."""
    return not pin.is_awaited, pin.program_arrival_s
