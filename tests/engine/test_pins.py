"""Pins: the ledger, quotas, who yields to whom, and what is charged."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pelton.core.tenant import parse_tenants
from pelton.engine.kv.block_pool import BlockPool
from pelton.engine.kv.pins import Pin, PinEnd, PinTable
from tests.make import ManualClock, make_request


class Pins:
    """A table over a pool of 100 blocks, a clock, and what was charged."""

    def __init__(self, *tenants: str) -> None:
        self.pool = BlockPool(101)
        self.clock = ManualClock()
        self.charged: dict[str, float] = {}
        self.table = PinTable(self.pool, parse_tenants(tenants or ["*:max_pin_share=0.5"]), self.clock, self._charge)
        self._num_published = 0

    def _charge(self, tenant_id: str, num_block_seconds: float) -> None:
        self.charged[tenant_id] = self.charged.get(tenant_id, 0.0) + num_block_seconds

    def publish(self, num_blocks: int) -> tuple[int, ...]:
        """Blocks that are found by their content, and held by the caller."""
        block_ids = self.pool.try_allocate(num_blocks)
        assert block_ids is not None
        for block_id in block_ids:
            self._num_published += 1
            self.pool.publish(block_id, (0, self._num_published.to_bytes(8, "little")))
        return tuple(block_ids)

    def pin(self, tenant_id: str, num_blocks: int, arrival_s: float = 0.0, keep_s: float = 10.0) -> Pin | None:
        """Pin blocks that a request held until now."""
        block_ids = self.publish(num_blocks)
        pin = self.pin_blocks(tenant_id, block_ids, arrival_s, keep_s)
        self.pool.release(block_ids)
        return pin

    def pin_blocks(
        self, tenant_id: str, block_ids: tuple[int, ...], arrival_s: float = 0.0, keep_s: float = 10.0
    ) -> Pin | None:
        expires_s = self.clock.now_s() + keep_s
        pin = Pin(tenant_id=tenant_id, program_arrival_s=arrival_s, block_ids=block_ids, expires_s=expires_s)
        return pin if self.table.try_pin(pin) else None

    def check(self) -> None:
        self.pool.check(pin.block_ids for pin in self.table)


def head(tenant_id: str, arrival_s: float) -> Any:
    return make_request(tenant_id=tenant_id, program_arrival_s=arrival_s)


def test_pinned_blocks_are_not_evicted_and_expired_ones_are() -> None:
    pins = Pins()
    pin = pins.pin("a", 40)
    assert pin is not None
    assert pins.pool.try_allocate(61) is None
    assert pins.table.next_expiry_s == 10.0
    pins.clock.time_s = 10.0
    pins.table.expire()
    assert pin.ended is PinEnd.EXPIRED
    assert pins.table.next_expiry_s is None
    assert pins.pool.num_cached == 40, "what was pinned can still be found"
    assert pins.pool.try_allocate(100) is not None


def test_a_pin_that_is_waited_for_outlives_its_time() -> None:
    pins = Pins()
    pin = pins.pin("a", 10)
    assert pin is not None
    pin.is_awaited = True
    pins.clock.time_s = 11.0
    pins.table.expire()
    assert pin.ended is None
    pins.table.stop_awaiting(pin)
    assert pin.ended is PinEnd.EXPIRED
    pins.check()


def test_a_tenant_over_its_quota_loses_its_own_latest_program_first() -> None:
    pins = Pins("a:max_pin_share=0.3", "b:max_pin_share=0.5")
    of_b = pins.pin("b", 30, arrival_s=99.0)
    early, middle, late = (pins.pin("a", 10, arrival_s=arrival_s) for arrival_s in (1.0, 2.0, 3.0))
    assert pins.pin("a", 10, arrival_s=1.5) is not None
    assert [pin and pin.ended for pin in (early, middle, late, of_b)] == [None, None, PinEnd.OVER_QUOTA, None]
    assert pins.pin("a", 10, arrival_s=4.0) is None, "the new pin is the latest itself"
    assert pins.pin("a", 31, arrival_s=0.0) is None, "more than the quota"
    assert pins.pin("a", 15, arrival_s=1.9) is None, "what ranks behind it would not be enough"
    assert pins.table.num_blocks("a") == 30
    pins.check()


def test_shared_blocks_count_once_for_the_quota_and_the_charge() -> None:
    pins = Pins("a:max_pin_share=0.3")
    shared = pins.publish(20)
    forks = [pins.pin_blocks("a", shared) for _ in range(5)]
    assert None not in forks
    assert pins.table.num_blocks("a") == 20
    pins.clock.time_s = 3.0
    pins.table.charge()
    assert pins.charged == {"a": 60.0}
    for pin in forks:
        assert pin is not None
        pins.table.end(pin, PinEnd.DELETED)
        pins.table.end(pin, PinEnd.DELETED)  # twice is once
    assert pins.table.num_ended[PinEnd.DELETED] == 5
    pins.pool.release(shared)
    pins.check()


def test_charges_follow_what_is_held() -> None:
    pins = Pins()
    first = pins.pin("a", 10)
    pins.clock.time_s = 2.0
    pins.pin("a", 5)
    pins.pin("b", 1)
    pins.clock.time_s = 3.0
    assert first is not None
    pins.table.end(first, PinEnd.SUPERSEDED)
    pins.clock.time_s = 5.0
    pins.table.charge()
    assert pins.charged == {"a": 2 * 10 + 1 * 15 + 2 * 5, "b": 3.0}


def test_running_requests_come_before_pins() -> None:
    pins = Pins()
    early, late = pins.pin("a", 30, arrival_s=1.0), pins.pin("b", 30, arrival_s=2.0)
    pins.table.yield_to_running(60)
    assert early is not None
    assert late is not None
    assert (early.ended, late.ended) == (None, PinEnd.YIELDED)
    assert pins.pool.num_available >= 60


@pytest.mark.parametrize(
    ("tenant_id", "arrival_s", "num_short", "is_idle", "yields"),
    [
        ("a", 5.0, 10, False, []),  # later than all of its own, and b is within its share
        ("a", 2.5, 8, False, ["a3"]),
        ("a", 2.5, 60, False, []),  # not enough, so nothing is given up in vain
        ("a", 0.5, 10, False, ["a3", "a2"]),  # b's pin arrived at 0, before it
        ("a", 5.0, 8, True, ["a3"]),  # nothing runs: the latest of all
        ("a", 5.0, 99, True, ["a3", "a2", "a1", "b0"]),
        ("c", 9.0, 5, False, ["a3"]),  # a has 24 of 100 blocks, more than half of a third
        ("c", 9.0, 16, False, []),  # without it, no more than that
    ],
)
def test_who_yields_to_the_head(
    tenant_id: str, arrival_s: float, num_short: int, is_idle: bool, yields: list[str]
) -> None:
    pins = Pins()
    made = {f"a{n}": pins.pin("a", 8, arrival_s=float(n)) for n in (1, 2, 3)}
    made["b0"] = pins.pin("b", 16, arrival_s=0.0)
    rest = pins.publish(100 - 3 * 8 - 16)
    assert pins.table.try_yield_to_head(head(tenant_id, arrival_s), num_short, is_idle=is_idle) == bool(yields)
    assert [name for name, pin in made.items() if pin and pin.ended] == sorted(yields)
    pins.pool.release(rest)
    pins.check()


def test_a_tenant_over_its_fair_share_yields_to_another_however_late() -> None:
    pins = Pins()
    early, late = pins.pin("a", 25, arrival_s=1.0), pins.pin("a", 25, arrival_s=2.0)
    assert early is not None
    assert late is not None
    assert pins.table.try_yield_to_head(head("b", 9.0), 20, is_idle=False)
    assert (early.ended, late.ended) == (None, PinEnd.YIELDED)
    # What is left is the fair share of one of two tenants: a quarter of the cache, half of its quota.
    assert not pins.table.try_yield_to_head(head("b", 9.0), 20, is_idle=False)


def test_blocks_that_a_running_request_shares_do_not_count_as_room() -> None:
    pins = Pins()
    shared = pins.publish(40)
    pin = pins.pin_blocks("a", shared, arrival_s=5.0)
    assert pin is not None
    assert not pins.table.try_yield_to_head(head("a", 1.0), 1, is_idle=False)
    assert pin.ended is None


class _PinTraffic(RuleBasedStateMachine):
    """Random pins of three tenants over overlapping blocks: the ledger balances, quotas and charges hold."""

    def __init__(self) -> None:
        super().__init__()
        self.pins = Pins("a:max_pin_share=0.2", "b:max_pin_share=0.6", "c:max_pin_share=1")
        self.quotas = {"a": 20, "b": 60, "c": 100}
        self.made: list[Pin] = []

    @rule(
        tenant_id=st.sampled_from("abc"),
        num_blocks=st.integers(0, 40),
        arrival_s=st.floats(0, 100),
        keep_s=st.floats(0, 20),
    )
    def add(self, tenant_id: str, num_blocks: int, arrival_s: float, keep_s: float) -> None:
        if self.pins.pool.num_available >= num_blocks:
            pin = self.pins.pin(tenant_id, num_blocks, arrival_s, keep_s)
            self.made += [pin] if pin is not None else []

    @rule(data=st.data(), arrival_s=st.floats(0, 100))
    def fork(self, data: st.DataObject, arrival_s: float) -> None:
        alive = [pin for pin in self.made if pin.ended is None]
        if alive:
            origin = data.draw(st.sampled_from(alive))
            pin = self.pins.pin_blocks(origin.tenant_id, origin.block_ids, arrival_s)
            self.made += [pin] if pin is not None else []

    @rule(data=st.data(), reason=st.sampled_from(PinEnd))
    def end(self, data: st.DataObject, reason: PinEnd) -> None:
        if self.made:
            self.pins.table.end(data.draw(st.sampled_from(self.made)), reason)

    @rule(tenant_id=st.sampled_from("abcd"), arrival_s=st.floats(0, 100), num=st.integers(1, 80), is_idle=st.booleans())
    def queue(self, tenant_id: str, arrival_s: float, num: int, is_idle: bool) -> None:
        before = self.pins.pool.num_available
        yielded = self.pins.table.try_yield_to_head(head(tenant_id, arrival_s), num, is_idle=is_idle)
        if yielded and not is_idle:
            assert self.pins.pool.num_available >= before + num
        elif not yielded:
            assert self.pins.pool.num_available == before
        if is_idle:
            assert not len(self.pins.table) or self.pins.pool.num_available >= before + num

    @rule(num_blocks=st.integers(1, 100))
    def run_request(self, num_blocks: int) -> None:
        self.pins.table.yield_to_running(num_blocks)
        assert self.pins.pool.num_available >= num_blocks, "nothing but pins was in the way"

    @rule(seconds=st.floats(0.001, 30))
    def wait(self, seconds: float) -> None:
        self.pins.clock.time_s += seconds
        self.pins.table.expire()
        assert all(pin.expires_s > self.pins.clock.time_s for pin in self.pins.table)

    @invariant()
    def balances(self) -> None:
        self.pins.check()
        assert set(self.pins.table) == {pin for pin in self.made if pin.ended is None}
        for tenant_id, quota in self.quotas.items():
            blocks = {b for pin in self.pins.table if pin.tenant_id == tenant_id for b in pin.block_ids}
            assert self.pins.table.num_blocks(tenant_id) == len(blocks) <= quota


TestPinTraffic = _PinTraffic.TestCase
TestPinTraffic.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
