"""What holds for every policy, and what each one is for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pelton.core.errors import ConfigError
from pelton.core.events import EventKind
from pelton.core.request import Request, RequestStatus
from pelton.core.tenant import TenantSettings, parse_tenants
from pelton.engine.config import POLICY_NAMES
from pelton.engine.engine import Engine
from pelton.engine.policies import POLICIES
from pelton.engine.policies.by_tenant import ByTenantPolicy
from pelton.engine.policies.context import PolicyContext
from pelton.engine.policies.fair import ABOUT_S, SHARED_STEP_TOKENS
from tests.make import ContextExecutor, ManualClock, make_engine, make_request, make_submission, run, step

ALL = sorted(POLICIES)


def test_every_policy_can_be_chosen() -> None:
    assert sorted(POLICY_NAMES) == ALL


def make_policy(name: str, **context: Any) -> ByTenantPolicy:
    policy = POLICIES[name](PolicyContext(**({"clock": ManualClock()} | context)))
    assert isinstance(policy, ByTenantPolicy)
    return policy


def admit(policy: ByTenantPolicy, request: Request) -> None:
    policy.admit(request, 0)
    request.status = RequestStatus.RUNNING
    policy.charge_prefill(request, request.num_prompt_tokens)


def finish(policy: ByTenantPolicy, request: Request) -> None:
    policy.finish(request)
    request.status = RequestStatus.FINISHED


def finished_order(engine: Engine) -> list[str]:
    return [output.request_id for output in run(engine) if output.finish_reason is not None]


# -- every policy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=40, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(
    operations=st.lists(
        st.tuples(
            st.sampled_from(["add", "add", "admit", "admit some", "preempt", "finish", "charge"]), st.integers(0, 9)
        ),
        max_size=60,
    ),
    max_num_running=st.sampled_from([None, 2]),
)
def test_the_books_balance_whatever_happens(
    name: str, operations: list[tuple[str, int]], max_num_running: int | None
) -> None:
    cap = "" if max_num_running is None else f",max_num_running={max_num_running}"
    clock = ManualClock()
    policy = make_policy(name, tenants=parse_tenants([f"*:weight=1{cap}"]), clock=clock)
    waiting: list[Request] = []
    running: list[Request] = []
    for what, number in operations:
        clock.time_s += 1
        if what == "add":
            waiting.append(
                make_request(arrival_time_s=clock.time_s, tenant_id=f"t{number % 4}", program_id=f"p{number % 3}")
            )
            policy.add(waiting[-1])
        elif what.startswith("admit"):
            for index, request in enumerate(policy.waiting()):
                if what == "admit" or (number + index) % 2:
                    admit(policy, request)
                    waiting.remove(request)
                    running.append(request)
        elif what == "charge" and running:
            policy.charge(running[number % len(running)].tenant_id, 1)
        elif what == "preempt" and running:
            request = running.pop(number % len(running))
            request.num_preemptions += 1
            request.status = RequestStatus.PREEMPTED
            policy.preempt(request)
            waiting.append(request)
        elif what == "finish" and waiting + running:
            everyone = waiting + running
            request = everyone[number % len(everyone)]
            (waiting if request in waiting else running).remove(request)
            finish(policy, request)
        assert len(policy) == len(waiting)
        counts = Counter(request.tenant_id for request in running)
        offered = list(policy.waiting())
        assert len({request.request_id for request in offered}) == len(offered)
        expected = [r for r in waiting if max_num_running is None or counts[r.tenant_id] < max_num_running]
        assert {r.request_id for r in offered} == {r.request_id for r in expected}
        stats = {entry.tenant_id: (entry.num_running, entry.num_waiting) for entry in policy.tenant_stats()}
        stats = {tenant_id: numbers for tenant_id, numbers in stats.items() if any(numbers)}  # those idle aside
        waiting_counts = Counter(request.tenant_id for request in waiting)
        assert stats == {t: (counts[t], waiting_counts[t]) for t in {*counts, *waiting_counts}}


@pytest.mark.parametrize("name", ALL)
def test_a_tenant_runs_no_more_than_its_cap(name: str) -> None:
    engine = make_engine(policy=name, tenants=["capped:max_num_running=2"])
    for index in range(6):
        engine.submit(make_submission([index] * 5, tenant_id="capped"))
        engine.submit(make_submission([50 + index] * 5, tenant_id="free"))
    most: Counter[str] = Counter()
    while engine.has_work:
        step(engine)
        most |= Counter(request.tenant_id for request in engine.scheduler.running)
    assert most == {"capped": 2, "free": 6}


@pytest.mark.parametrize("name", ALL)
def test_a_tenant_starts_nothing_beyond_its_part_of_the_kv_cache(name: str) -> None:
    engine = make_engine(policy=name, tenants=["capped:max_kv_share=0.25"], num_blocks=101)
    for index in range(6):
        engine.submit(make_submission([index] * 40, tenant_id="capped", max_tokens=2))
    engine.submit(make_submission([77] * 150, "large", tenant_id="capped", max_tokens=2))
    most = 0
    while engine.has_work:
        step(engine)
        most = max(most, len(engine.scheduler.running))
    assert most == 2  # 10 or 11 blocks each, of 25; the large one, of 38, runs alone


@pytest.mark.parametrize("name", ALL)
def test_who_gets_no_memory_does_not_block_others(name: str) -> None:
    clock = ManualClock()
    engine = make_engine(policy=name, num_blocks=41, max_model_len=160, max_num_seqs=4, clock=clock)
    engine.submit(make_submission([1] * 60, "running", max_tokens=60, tenant_id="a"))
    step(engine)
    step(engine)
    clock.time_s += 1
    for index in range(4):
        engine.submit(make_submission([7 + index] * 110, f"big{index}", max_tokens=2, tenant_id="a"))
    clock.time_s += 1
    engine.submit(make_submission([3], "small", max_tokens=2, tenant_id="b"))
    order = finished_order(engine)
    assert order[:2] == ["small", "running"]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_nobody_is_preempted_again_before_it_made_progress(name: str, enable_prefix_caching: bool) -> None:
    """Chunks of 2 tokens: a recompute takes long, and those who decode want blocks meanwhile."""
    engine = make_engine(
        policy=name,
        num_blocks=31,
        max_model_len=80,
        enable_prefix_caching=enable_prefix_caching,
        long_prefill_chunk=2,
        clock=ManualClock(),
    )
    for index in range(12):
        engine.submit(
            make_submission([index] * 17, f"r{index}", max_tokens=50, tenant_id=f"t{index % 3}", ignore_eos=True)
        )
    lost: dict[str, int] = {}
    num_preemptions = 0
    while engine.has_work:
        step(engine)
        for request in engine.scheduler.requests.values():
            if request.status is RequestStatus.PREEMPTED and request.num_preemptions > num_of(lost, request):
                assert request.num_lost_tokens > lost.get(request.request_id, 0)
                lost[request.request_id] = request.num_lost_tokens
                lost[request.request_id + "#"] = request.num_preemptions
                num_preemptions += 1
    assert num_preemptions > 3


def num_of(lost: dict[str, int], request: Request) -> int:
    return lost.get(request.request_id + "#", 0)


def test_a_preemption_says_who_for_whom_and_how_much(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(policy="fair", num_blocks=20, max_model_len=60)
    events = []
    for name, num_tokens in (("large", 30), ("small", 12)):
        engine.submit(make_submission([num_tokens] * num_tokens, name, max_tokens=30, ignore_eos=True, tenant_id=name))
    with caplog.at_level("INFO", logger="pelton.engine"):
        while engine.has_work:
            engine.dispatch()
            engine.collect()
            update = engine.take_update()
            events += [e for e in update.events if e.kind is EventKind.PREEMPTED] if update else []
    assert events
    assert (events[0].request_id, events[0].detail) == ("large", "no free KV block for small (tenant small)")
    assert events[0].num_tokens > 30
    assert "preempted large (tenant large): no free KV block for small (tenant small)" in caplog.text
    assert f"up to {events[0].num_tokens} tokens" in caplog.text


# -- each one -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fair", "agent"])
def test_the_tenant_that_holds_most_memory_yields(name: str) -> None:
    engine = make_engine(policy=name, num_blocks=61, max_num_seqs=8, max_num_batched_tokens=64)
    for index in range(5):
        engine.submit(make_submission([index] * 30, f"flood{index}", max_tokens=60, tenant_id="flood", ignore_eos=True))
    engine.submit(make_submission([9] * 10, "chat", max_tokens=40, tenant_id="chat", ignore_eos=True))
    run(engine)
    executor = engine.executor
    assert isinstance(executor, ContextExecutor)
    preempted = {name for batch in executor.batches for name in batch.preempted_ids}
    assert preempted
    assert "chat" not in preempted


def test_of_one_tenants_requests_the_cheapest_later_one_yields() -> None:
    policy = make_policy("fair")
    requests = [make_request(arrival_time_s=float(index), max_num_tokens=99) for index in range(4)]
    for request, num_computed_tokens in zip(requests, (90, 70, 20, 50), strict=True):
        policy.add(request)
        admit(policy, request)
        request.num_computed_tokens = num_computed_tokens
    assert policy.choose_victim(requests[1:], requests[0]) is requests[2]
    assert policy.choose_victim(requests[:2], requests[3]) is None


def test_agent_serves_the_program_that_began_first() -> None:
    policy = make_policy("agent")
    calls = [
        make_request(arrival_time_s=0.0, program_id="old"),
        make_request(arrival_time_s=10.0, program_id="new"),
        make_request(arrival_time_s=20.0, program_id="old"),
        make_request(arrival_time_s=30.0),
        make_request(arrival_time_s=40.0, program_id="new"),
    ]
    for call in calls:
        policy.add(call)
    assert [call.arrival_time_s for call in policy.waiting()] == [0.0, 20.0, 10.0, 40.0, 30.0]


def test_agent_is_fair_between_tenants_first() -> None:
    policy = make_policy("agent")
    for index in range(4):
        policy.add(make_request(arrival_time_s=float(index), tenant_id="many", program_id="p"))
    policy.add(make_request(arrival_time_s=9.0, tenant_id="one"))
    order = []
    for request in policy.waiting():
        order.append(request.tenant_id)
        admit(policy, request)
    assert order == ["many", "one", "many", "many", "many"]


@pytest.mark.parametrize(("name", "bound_s"), [("agent", 600.0), ("program", 7 * 15.0)])
@settings(max_examples=60, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(calls=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 4), st.integers(0, 200_000)), max_size=30))
def test_no_call_is_overtaken_by_one_that_comes_much_later(
    name: str, bound_s: float, calls: list[tuple[int, int, int]]
) -> None:
    """The starvation bound."""
    clock = ManualClock()
    policy = make_policy(name, clock=clock)
    for pause_s, number, num_tokens in calls:  # calls that end before the next one comes give programs their past
        clock.time_s += pause_s
        request = make_request(arrival_time_s=clock.time_s, program_id=f"p{number}")
        policy.add(request)
        if num_tokens % 2:
            policy.admit(request, 0)
            request.status = RequestStatus.RUNNING
            request.num_charged_tokens = num_tokens
            finish(policy, request)
    arrivals_s = [request.arrival_time_s for request in policy.waiting()]
    latest_s = 0.0
    for arrival_s in arrivals_s:
        assert latest_s - arrival_s <= bound_s
        latest_s = max(latest_s, arrival_s)


def call_of(policy: ByTenantPolicy, program_id: str, service: int, arrival_time_s: float = 0.0) -> Request:
    """A running call that will have had `service`."""
    request = make_request(program_id=program_id, arrival_time_s=arrival_time_s)
    policy.add(request)
    policy.admit(request, 0)
    request.status = RequestStatus.RUNNING
    request.num_charged_tokens = service
    return request


def test_program_prefers_least_attained_service() -> None:
    policy = make_policy("program")
    finish(policy, call_of(policy, "long", 5000))
    finish(policy, call_of(policy, "long", 5000))
    finish(policy, call_of(policy, "short", 1000))
    for index, program_id in enumerate(("long", "short", "fresh")):
        policy.add(make_request(program_id=program_id, arrival_time_s=float(index)))
    assert [request.program_id for request in policy.waiting()] == ["short", "fresh", "long"]


def test_program_counts_the_longest_chain_of_parallel_calls() -> None:
    policy = make_policy("program")
    parallel = [call_of(policy, "wide", 3000) for _ in range(4)]
    for call in parallel:
        finish(policy, call)
    first = call_of(policy, "deep", 3000)
    finish(policy, first)
    second = call_of(policy, "deep", 3000)
    finish(policy, second)
    keys = {}
    for program_id in ("wide", "deep"):
        request = make_request(program_id=program_id)
        policy.add(request)
        keys[program_id] = policy.request_key(request)
    assert keys["wide"] < keys["deep"]


def dlpm_with(cached: dict[str, int], **context: Any) -> ByTenantPolicy:
    return make_policy("dlpm", num_cached_tokens=lambda request: cached.get(request.request_id, 0), **context)


def test_dlpm_goes_by_cached_prefix_while_there_is_credit() -> None:
    cached = {"b": 30, "c": 10}
    policy = dlpm_with(cached)
    for index, request_id in enumerate("abc"):
        policy.add(make_request(range(100), request_id=request_id, arrival_time_s=float(index)))
    assert [request.request_id for request in policy.waiting()] == ["b", "c", "a"]


@pytest.mark.parametrize(("quantum", "order"), [(1e9, "yyyyyyxxxxxx"), (1.0, "xyxyxyxyxyxy")])
def test_dlpm_lies_between_fair_and_longest_prefix_first(quantum: float, order: str) -> None:
    cached = {f"y{index}": 50 for index in range(6)}
    policy = dlpm_with(cached)
    policy.quantum = quantum  # type: ignore[attr-defined]
    for index in range(6):
        for tenant_id in "xy":
            policy.add(make_request(range(100), request_id=f"{tenant_id}{index}", tenant_id=tenant_id))
    got = []
    for request in policy.waiting():
        got.append(request.tenant_id)
        admit(policy, request)
    assert sorted(got) == sorted(order)
    if quantum > 1:
        assert "".join(got) == order
    else:
        assert all(abs(got[:n].count("x") - got[:n].count("y")) <= 1 for n in range(13))


def test_dlpm_lets_nobody_wait_for_ever_behind_longer_matches() -> None:
    clock = ManualClock()
    cached = {"fresh": 90}
    policy = dlpm_with(cached, clock=clock)
    policy.add(make_request(range(100), request_id="old", arrival_time_s=0.0))
    clock.time_s = 31.0
    policy.add(make_request(range(100), request_id="fresh", arrival_time_s=31.0))
    assert next(iter(policy.waiting())).request_id == "old"


def test_kv_held_over_time_is_charged() -> None:
    clock = ManualClock()
    policy = make_policy("fair", clock=clock, kv_charge=0.5)
    request = make_request(tenant_id="a")
    policy.add(request)
    admit(policy, request)
    request.block_tables = [[1, 2, 3]]
    before = policy.tenants["a"].service
    clock.time_s += 10
    list(policy.waiting())
    assert policy.tenants["a"].service - before == 0.5 * 3 * 10
    policy.charge_kv("a", 20.0)
    assert policy.tenants["a"].service - before == 0.5 * 3 * 10 + 20, "pins cost one a block and second at least"


# -- tenants' settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts",
    [
        ["a:weight=2,max_num_running=8", "b:c:max_kv_share=0.5"],
        ["a:weight=2", "max_num_running=8", "b:c:max_kv_share=0.5"],
    ],
)
def test_settings_of_tenants_are_read(texts: list[str]) -> None:
    tenants = parse_tenants([*texts, "*:max_num_waiting=5"])
    assert tenants.of("a") == TenantSettings(weight=2.0, max_num_running=8, max_num_waiting=5)
    assert tenants.of("b:c") == TenantSettings(max_kv_share=0.5, max_num_waiting=5)
    assert tenants.of("anybody") == TenantSettings(max_num_waiting=5)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a:wight=2", "there is no setting 'wight'"),
        ("a:weight=x", "'x'"),
        ("a:max_num_running=1.5", "'1.5'"),
        ("a:weight=nan", "weight is nan"),
        ("a:max_kv_share=0", "max_kv_share is 0"),
        ("weight=2", "names no tenant"),
        ("a:weight=1,a:weight=2", "a is there twice"),
    ],
)
def test_wrong_settings_of_tenants_are_named(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_tenants([text])


@pytest.mark.parametrize("name", ["fair", "agent"])
def test_steps_are_short_while_tenants_share(name: str) -> None:
    """Who arrives waits for the step that runs: its prompt chunks are small, until the others have gone."""
    clock = ManualClock()
    policy = make_policy(name, clock=clock)
    clock.time_s = 100.0
    first = make_request(range(4000), tenant_id="a")
    policy.add(first)
    admit(policy, first)
    assert policy.narrow(512) == 512
    clock.time_s += 5
    second = make_request(tenant_id="b")
    policy.add(second)
    assert policy.narrow(512) == SHARED_STEP_TOKENS
    assert policy.narrow(16) == 16
    admit(policy, second)
    finish(policy, second)
    clock.time_s += ABOUT_S - 1
    policy.charge_prefill(first, 128)
    assert policy.narrow(512) == SHARED_STEP_TOKENS
    clock.time_s += 2
    policy.charge_prefill(first, 128)
    assert policy.narrow(512) == 512


@pytest.mark.parametrize(("name", "most"), [("fcfs", 512), ("fair", SHARED_STEP_TOKENS), ("agent", SHARED_STEP_TOKENS)])
def test_the_scheduler_keeps_steps_short_while_tenants_share(name: str, most: int) -> None:
    engine = make_engine(policy=name, num_blocks=1000, max_model_len=4096, max_num_batched_tokens=512)
    engine.submit(make_submission([7] * 3000, tenant_id="a"))
    assert (batch := engine.scheduler.schedule()) is not None
    assert batch.num_tokens == 512
    engine.submit(make_submission(range(40), tenant_id="b"))
    sizes = [batch.num_tokens for _ in range(3) if (batch := engine.scheduler.schedule()) is not None]
    assert max(sizes) <= most + 1  # a decode rides along
    assert max(sizes) >= most - 40
