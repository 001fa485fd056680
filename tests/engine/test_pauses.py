"""How long a context is kept: tau* against brute force, cold start, tenants apart."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pelton.engine.pauses import (
    MAX_OBSERVATIONS,
    MAX_TENANTS,
    MAX_TOOLS,
    PauseTimes,
    QueueDelay,
    TurnCorrelation,
    best_keep_s,
    default_keep_s,
)

PAUSES = st.lists(st.one_of(st.floats(0.0, 1000.0), st.just(math.inf)), min_size=1, max_size=60)


@given(PAUSES, st.floats(0.0, 2000.0), st.one_of(st.floats(0.0, 2000.0), st.just(math.inf)))
def test_tau_is_that_of_brute_force(pauses_s: list[float], gain_s: float, limit_s: float) -> None:
    def net_s(tau_s: float) -> float:
        return sum(pause_s <= tau_s for pause_s in pauses_s) / len(pauses_s) * gain_s - tau_s

    # Not keeping at all is worth 0, whatever returns at once would have found.
    best_s = max((tau_s for tau_s in pauses_s if tau_s <= limit_s and tau_s < math.inf), key=net_s, default=0.0)
    found_s = best_keep_s(sorted(pauses_s), gain_s, limit_s)
    assert found_s == 0.0 or found_s in pauses_s
    assert found_s <= limit_s
    if net_s(best_s) > 1e-9:
        assert net_s(found_s) == pytest.approx(net_s(best_s), abs=1e-9)
    else:
        assert found_s == 0.0 or net_s(found_s) >= -1e-9


def test_without_anything_to_gain_nothing_is_kept() -> None:
    assert best_keep_s([0.1, 0.2, 0.3], gain_s=0.0) == 0.0
    assert default_keep_s(0.0) == 0.0


def test_cold_start_goes_from_default_to_tenant_to_tool() -> None:
    pauses = PauseTimes(min_observations=10)
    gain_s = math.e**2
    assert pauses.keep_s("a", "bash", gain_s, math.inf) == pytest.approx(2.0)
    for _ in range(11):
        pauses.observe("a", None, 3.0)
    assert pauses.keep_s("a", "bash", gain_s, math.inf) == 3.0
    for _ in range(11):
        pauses.observe("a", "bash", 0.5)
    assert pauses.keep_s("a", "bash", gain_s, math.inf) == 0.5
    assert pauses.keep_s("a", "another", gain_s, math.inf) == 3.0  # 22 of them return within 3 s, half within 0.5


def test_a_tool_that_never_returns_is_not_waited_for() -> None:
    pauses = PauseTimes(min_observations=10)
    for _ in range(20):
        pauses.observe("a", "hung", math.inf)
        pauses.observe("a", "quick", 0.2)
    assert pauses.keep_s("a", "hung", 100.0, math.inf) == 0.0
    assert pauses.keep_s("a", "quick", 100.0, math.inf) == 0.2


def test_a_limit_below_every_pause_means_not_to_keep() -> None:
    assert best_keep_s([5.0, 6.0], gain_s=100.0, limit_s=4.0) == 0.0


def test_tenants_do_not_decide_over_each_other() -> None:
    pauses = PauseTimes(min_observations=10)
    for _ in range(100):
        pauses.observe("hostile", "bash", 1e6)
    assert pauses.keep_s("victim", "bash", math.e, math.inf) == pytest.approx(1.0)


def test_what_clients_name_is_bounded() -> None:
    pauses = PauseTimes()
    for index in range(2 * MAX_TENANTS):
        pauses.observe(f"tenant-{index}", f"tool-{index}", 1.0)
    for index in range(2 * MAX_TOOLS):
        pauses.observe("one", f"tool-{index}", 1.0)
    for _ in range(2 * MAX_OBSERVATIONS):
        pauses.observe("one", "tool", 1.0)
    assert len(pauses._tenants) == MAX_TENANTS
    assert len(pauses._tenants["one"].by_tool) == MAX_TOOLS
    assert len(pauses._tenants["one"].by_tool["tool"].ascending_s) == MAX_OBSERVATIONS


def test_old_pauses_are_forgotten() -> None:
    pauses = PauseTimes(min_observations=10)
    for pause_s in [50.0] * MAX_OBSERVATIONS + [1.0] * MAX_OBSERVATIONS:
        pauses.observe("a", None, pause_s)
    assert pauses.keep_s("a", None, 100.0, math.inf) == 1.0


def test_eta_of_fixed_and_geometric_sessions() -> None:
    fixed, geometric, empty = TurnCorrelation(), TurnCorrelation(), TurnCorrelation()
    random.seed(1)
    for _ in range(3000):
        fixed.observe(10)
        num_turns = 1
        while random.random() < 0.9:
            num_turns += 1
        geometric.observe(num_turns)
    assert empty.eta == 1.0
    assert fixed.eta == pytest.approx(1.0)
    # Weighted by turns, long sessions still show some; far from fixed all the same.
    assert geometric.eta < 0.4


def test_queue_delay_follows_the_latest() -> None:
    delay = QueueDelay()
    assert delay.mean_s == 0.0
    for delay_s in [10.0] * 500 + [1.0] * 500:
        delay.observe(delay_s)
    assert delay.mean_s == pytest.approx(1.0, rel=0.1)
