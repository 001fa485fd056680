"""Which cached block goes first: what every method keeps to, and what `value` learns."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pelton.engine.kv.block_pool import BlockPool
from pelton.engine.kv.eviction import EVICTIONS
from pelton.engine.kv.eviction.value import ReturnTimes
from tests.make import ManualClock

METHODS = sorted(EVICTIONS)


def make_pool(method: str, num_blocks: int, clock: ManualClock | None = None) -> BlockPool:
    return BlockPool(num_blocks + 1, EVICTIONS[method](clock or ManualClock(), lambda _: 1.0))


def key(name: int, index: int) -> tuple[int, bytes]:
    return 0, name.to_bytes(8, "little") + index.to_bytes(8, "little")


def use(pool: BlockPool, name: int, length: int, generation: int = 0) -> int:
    """A request over chain `name`: shares what is there, computes the rest. Returns what it found."""
    found: list[int] = []
    while len(found) < length and (block_id := pool.find(key(name, len(found)))) is not None:
        found.append(block_id)
    pool.share(found)
    table = list(found)
    taken = pool.try_allocate(length - len(found))
    assert taken is not None
    for block_id in taken:
        stale = pool.find(key(name, len(table)))
        if stale is not None:
            pool.unpublish(stale)
        pool.publish(block_id, key(name, len(table)), len(table), generation)
        table.append(block_id)
    pool.check([table])
    pool.release(reversed(table))
    pool.check([])
    return len(found)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 8), st.floats(0, 100)), max_size=60))
def test_the_ledger_balances_and_what_is_found_was_kept(method: str, uses: list[tuple[int, int, float]]) -> None:
    clock = ManualClock()
    pool = make_pool(method, 12, clock)
    for name, length, pause_s in uses:
        clock.time_s += pause_s
        use(pool, name, length)


@pytest.mark.parametrize("method", METHODS)
def test_a_chain_loses_its_end_before_its_beginning(method: str) -> None:
    clock = ManualClock()
    pool = make_pool(method, 10, clock)
    use(pool, 1, 8)
    clock.time_s = 1.0
    use(pool, 2, 5)
    assert [pool.find(key(1, index)) is not None for index in range(8)] == [True] * 5 + [False] * 3


@pytest.mark.parametrize("method", METHODS)
def test_without_a_history_the_oldest_goes_first(method: str) -> None:
    clock = ManualClock()
    pool = make_pool(method, 6, clock)
    for name in range(3):
        clock.time_s = 100.0 * name
        use(pool, name, 2)
    clock.time_s = 1000.0
    use(pool, 3, 2)
    assert pool.find(key(0, 0)) is None
    assert all(pool.find(key(name, 0)) is not None for name in (1, 2, 3))


def test_value_learns_which_chains_come_back() -> None:
    """Conversations go on after a minute, among many requests that never come again: LRU keeps neither."""
    found = {}
    for method in METHODS:
        clock = ManualClock()
        pool = make_pool(method, 120, clock)
        found[method] = 0
        for minute in range(200):
            for name in range(10):
                clock.time_s += 3.0
                found[method] += use(pool, name, 8, generation=min(minute, 3))
                clock.time_s += 3.0
                use(pool, 1000 + 10 * minute + name, 8)
    assert found["lru"] == 0
    assert found["value"] > 0.6 * 200 * 10 * 8


@pytest.mark.parametrize(
    ("found", "lost", "best"),
    [
        # Comes back within half a second or never.
        ({1: 90}, {5: 10}, 1),
        # Comes back after half a minute: worth most just before.
        ({7: 90}, {12: 10}, 7),
    ],
)
def test_rates_follow_what_was_seen(found: dict[int, int], lost: dict[int, int], best: int) -> None:
    times = ReturnTimes(0)
    times.found = [1e-3 + found.get(age, 0) for age in range(len(times.found))]
    times.lost = [1e-3 + lost.get(age, 0) for age in range(len(times.lost))]
    rates = times.best_rates()
    assert max(range(len(rates)), key=rates.__getitem__) == best
    assert min(rates) >= 0
