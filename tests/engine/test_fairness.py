"""VTC's lemmas (arXiv 2401.00588, section 4) on random traffic through the production scheduler.

U bounds what one tenant can be charged after the last time that it was least served and got a request
in: its running requests, R at most, finish. Without a shortage of memory that is the paper's
U = max(w_p * L_input, w_q * M) with M = R * L_total. Where the paper is silent (preemption, prefix
hits, requests that pass one without room) the bound that holds is U + max_lead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import combinations, count
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pelton.core.batch import ScheduledBatch, ScheduledRequest, StepResult
from pelton.core.request import RequestStatus
from pelton.engine.policies.by_tenant import INPUT_TOKEN_SERVICE, OUTPUT_TOKEN_SERVICE, ByTenantPolicy
from tests.make import check_ledger, make_engine, make_submission

MAX_NUM_SEQS = 4
MAX_PROMPT = 40
MAX_OUTPUT = 12
U = OUTPUT_TOKEN_SERVICE * MAX_NUM_SEQS * (MAX_PROMPT + MAX_OUTPUT)
MAX_LEAD = 60.0
FAIR_POLICIES = ["fair", "agent"]


class OneTokenExecutor:
    """Samples token 1 wherever a token is due; keeps the batches."""

    def __init__(self) -> None:
        self.batches: list[ScheduledBatch] = []

    def submit(self, batch: ScheduledBatch) -> Future[StepResult]:
        self.batches.append(batch)
        future: Future[StepResult] = Future()
        future.set_result(StepResult(batch.step_id, tuple((1,) if s.samples else () for s in batch.requests)))
        return future

    def close(self) -> None:
        pass


@dataclass
class Record:
    """What an onlooker sees: service by tenant after every step, and who had something waiting then."""

    service: list[dict[str, float]] = field(default_factory=list)
    backlogged: list[frozenset[str]] = field(default_factory=list)
    max_spread: float = 0.0

    def max_difference(self, weights: dict[str, float] | None = None) -> float:
        """Largest |W_f - W_g| over all intervals in which both were backlogged all along."""
        weights = weights or {}
        worst = 0.0
        for f, g in combinations(sorted(set().union(*self.backlogged)), 2):
            low = high = None
            for service, backlogged in zip(self.service, self.backlogged, strict=True):
                if not {f, g} <= backlogged:
                    low = high = None
                    continue
                lead = service.get(f, 0.0) / weights.get(f, 1.0) - service.get(g, 0.0) / weights.get(g, 1.0)
                low, high = min(lead, lead if low is None else low), max(lead, lead if high is None else high)
                worst = max(worst, high - low)
        return worst


class Onlooker:
    """Measures service from batches and outputs, not from the policy's accounts. Requests are named TENANT-NUMBER."""

    def __init__(self, **options: Any) -> None:
        self.executor = OneTokenExecutor()
        values = {"max_num_seqs": MAX_NUM_SEQS, "max_num_batched_tokens": 16, "max_num_waiting": 10_000}
        self.engine = make_engine(executor=self.executor, **(values | options))
        self.policy = self.engine.scheduler.policy
        assert isinstance(self.policy, ByTenantPolicy)
        self.record = Record()
        self._service: Counter[str] = Counter()
        self._reached: dict[str, int] = {}
        self._num_prompt_tokens: dict[str, int] = {}
        self._num_seen = 0
        self._count = count()

    def submit(self, tenant_id: str, num_prompt_tokens: int, max_tokens: int, token_id: int | None = None) -> str:
        """Prompts of one `token_id` share their prefix; without one nothing is shared."""
        request_id = f"{tenant_id}-{next(self._count)}"
        self._num_prompt_tokens[request_id] = num_prompt_tokens
        number = int(request_id.rpartition("-")[2])
        first = [number // 250, number % 250] if token_id is None else [token_id, token_id]
        prompt = (first + [7] * num_prompt_tokens)[:num_prompt_tokens]
        self.engine.submit(
            make_submission(prompt, request_id, tenant_id=tenant_id, max_tokens=max_tokens, ignore_eos=True)
        )
        return request_id

    def step(self) -> None:
        engine, scheduler = self.engine, self.engine.scheduler
        engine.dispatch()
        if engine.num_in_flight:
            engine.collect()
        check_ledger(engine)
        update = engine.take_update()
        for batch in self.executor.batches[self._num_seen :]:
            for scheduled in batch.requests:
                self._count_prompt(scheduled)
        self._num_seen = len(self.executor.batches)
        for output in update.outputs if update else ():
            self._service[output.request_id.rpartition("-")[0]] += OUTPUT_TOKEN_SERVICE * len(output.token_ids)
        waiting = [r for r in scheduler.requests.values() if r.status is not RequestStatus.RUNNING]
        backlogged = frozenset(request.tenant_id for request in waiting)
        counters = [self.policy.tenants[tenant_id].virtual_service for tenant_id in backlogged]
        self.record.service.append(dict(self._service))
        self.record.backlogged.append(backlogged)
        self.record.max_spread = max(self.record.max_spread, max(counters, default=0.0) - min(counters, default=0.0))

    def run(self, max_steps: int = 20_000) -> Record:
        while self.engine.has_work:
            self.step()
            assert len(self.record.service) < max_steps, "requests wait for ever"
        return self.record

    def _count_prompt(self, scheduled: ScheduledRequest) -> None:
        request_id, start = scheduled.request_id, scheduled.num_computed_tokens
        reached = self._reached.get(request_id, 0)
        end = min(start + len(scheduled.token_ids), self._num_prompt_tokens[request_id])
        self._service[request_id.rpartition("-")[0]] += INPUT_TOKEN_SERVICE * max(0, end - max(start, reached))
        self._reached[request_id] = max(reached, end)


@dataclass
class Arrival:
    after_steps: int
    tenant_id: str
    num_requests: int
    num_prompt_tokens: int
    max_tokens: int
    token_id: int | None


arrivals_strategy = st.lists(
    st.builds(
        Arrival,
        st.integers(0, 30),
        st.sampled_from("abc"),
        st.integers(1, 12),
        st.integers(2, MAX_PROMPT),
        st.integers(1, MAX_OUTPUT),
        st.sampled_from([None, None, 1, 2]),
    ),
    min_size=2,
    max_size=14,
)


def play(onlooker: Onlooker, arrivals: Sequence[Arrival], check: Callable[[Onlooker], None] = lambda _: None) -> Record:
    for arrival in arrivals:
        for _ in range(arrival.after_steps):
            onlooker.step()
            check(onlooker)
        for _ in range(arrival.num_requests):
            onlooker.submit(arrival.tenant_id, arrival.num_prompt_tokens, arrival.max_tokens, arrival.token_id)
    return onlooker.run()


@pytest.mark.parametrize("policy", FAIR_POLICIES)
@pytest.mark.parametrize("enable_overlap", [False, True])
@settings(max_examples=150, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(arrivals=arrivals_strategy)
def test_counter_spread_and_service_differences_are_bounded(
    policy: str, enable_overlap: bool, arrivals: list[Arrival]
) -> None:
    """Lemmas 4.3 and 4.4: nobody is preempted, nothing is shared."""
    onlooker = Onlooker(policy=policy, enable_overlap=enable_overlap, enable_prefix_caching=False)
    record = play(onlooker, arrivals)
    assert onlooker.engine.scheduler.counters.num_preemptions == 0
    assert record.max_spread <= U
    assert record.max_difference() <= 2 * U


@pytest.mark.parametrize("policy", FAIR_POLICIES)
@settings(max_examples=150, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(arrivals=arrivals_strategy, num_blocks=st.sampled_from([15, 18, 24]))
def test_bounds_with_preemption_and_prefix_hits(policy: str, arrivals: list[Arrival], num_blocks: int) -> None:
    """Where VTC is silent. Service: prompt tokens computed for the first time, and outputs."""
    onlooker = Onlooker(policy=policy, num_blocks=num_blocks, max_model_len=MAX_PROMPT + MAX_OUTPUT)
    onlooker.policy.max_lead = MAX_LEAD  # type: ignore[attr-defined]
    record = play(onlooker, arrivals)
    assert record.max_spread <= U + MAX_LEAD
    assert record.max_difference() <= 2 * (U + MAX_LEAD)


@settings(max_examples=150, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(arrivals=arrivals_strategy, quantum=st.sampled_from([10.0, 100.0]))
def test_dlpm_bounds_service_differences_by_its_quantum(arrivals: list[Arrival], quantum: float) -> None:
    """2 (U + Q), with prefix hits and without a shortage of memory."""
    onlooker = Onlooker(policy="dlpm", num_blocks=2000)
    onlooker.policy.quantum = quantum  # type: ignore[attr-defined]
    assert play(onlooker, arrivals).max_difference() <= 2 * (U + quantum)


@pytest.mark.parametrize("policy", FAIR_POLICIES)
def test_who_passes_a_request_without_room_gets_only_so_far_ahead(policy: str) -> None:
    onlooker = Onlooker(policy=policy, num_blocks=41, max_model_len=160, max_num_waiting=300)
    onlooker.policy.max_lead = MAX_LEAD  # type: ignore[attr-defined]
    onlooker.submit("holder", 60, 90)
    onlooker.step()
    onlooker.submit("big", 110, 2)
    for _ in range(60):
        onlooker.submit("small", 2, 8)
    while "big" in onlooker.record.backlogged[-1] or len(onlooker.record.backlogged) < 5:
        onlooker.step()
    small = onlooker.record.service[-2]["small"]
    one = 2 * INPUT_TOKEN_SERVICE + 8 * OUTPUT_TOKEN_SERVICE
    assert MAX_LEAD < small <= MAX_LEAD + MAX_NUM_SEQS * one


def test_memory_is_short_in_that_test() -> None:
    onlooker = Onlooker(policy="fair", num_blocks=15, max_model_len=MAX_PROMPT + MAX_OUTPUT)
    play(onlooker, [Arrival(0, name, 10, 12, 12, 1) for name in "abc"])
    counters = onlooker.engine.scheduler.counters
    assert counters.num_preemptions > 0
    assert counters.num_prefix_hits > 0


def test_without_fairness_the_bound_is_broken() -> None:
    onlooker = Onlooker(policy="fcfs", enable_prefix_caching=False)
    record = play(onlooker, [Arrival(0, "flood", 60, 40, 4, None), Arrival(0, "late", 60, 40, 4, None)])
    assert record.max_difference() > 2 * U


@pytest.mark.parametrize("policy", FAIR_POLICIES)
@settings(max_examples=150, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(arrivals=arrivals_strategy)
def test_work_conservation(policy: str, arrivals: list[Arrival]) -> None:
    """While anybody waits, a step is full: of requests or of tokens. There is memory for all.

    The one exception: who goes ahead of another's prompt has the step to itself, decodes aside.
    """

    def check(onlooker: Onlooker) -> None:
        if onlooker.record.backlogged[-1]:
            batch = onlooker.executor.batches[-1]
            started = {s.request_id for s in batch.requests if s.context is not None}
            chunks = {r.request_id for r in onlooker.engine.scheduler.running if r.num_remaining_tokens > 1}
            gave_way = bool(chunks - {s.request_id for s in batch.requests}) and bool(started)
            assert batch.num_tokens == 16 or len(batch.requests) == MAX_NUM_SEQS or gave_way
            assert batch.num_tokens

    play(Onlooker(policy=policy, enable_overlap=False, enable_prefix_caching=False), arrivals, check)


@pytest.mark.parametrize("policy", FAIR_POLICIES)
def test_weighted_shares(policy: str) -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    onlooker = Onlooker(policy=policy, tenants=[f"{name}:weight={weight}" for name, weight in weights.items()])
    for _ in range(400):
        for name in weights:
            onlooker.submit(name, 10, 4)
    while all(len(onlooker.policy.tenants[name].waiting) > 20 for name in weights):
        onlooker.step()
    service = onlooker.record.service[-1]
    for name, weight in weights.items():
        assert service[name] / sum(service.values()) == pytest.approx(weight / 10, rel=0.03)
    assert onlooker.record.max_difference(weights) <= 2 * U


def share_of_a_burst_after_idling(policy_changes: Callable[[Onlooker], None]) -> float:
    """Part of the service that an idle client gets once it sends a burst beside one who worked all the time."""
    onlooker = Onlooker(policy="fair")
    policy_changes(onlooker)
    for _ in range(300):
        onlooker.submit("steady", 10, 4)
    for _ in range(300):
        onlooker.step()
    before = Counter(onlooker.record.service[-1])
    for _ in range(100):
        onlooker.submit("burst", 10, 4)
    for _ in range(100):
        onlooker.step()
    gained = Counter(onlooker.record.service[-1]) - before
    return gained["burst"] / sum(gained.values())


def test_idling_saves_up_nothing() -> None:
    def remove_the_lift(onlooker: Onlooker) -> None:
        onlooker.policy.enters = lambda _: None  # type: ignore[method-assign]

    assert share_of_a_burst_after_idling(lambda _: None) == pytest.approx(0.5, abs=0.06)
    assert share_of_a_burst_after_idling(remove_the_lift) > 0.9


def test_a_newcomer_to_an_idle_server_is_lifted_to_who_left_last() -> None:
    """The empty-queue branch of VTC's algorithm 2."""
    onlooker = Onlooker(policy="fair")
    onlooker.submit("first", 20, 10)
    onlooker.run()
    onlooker.submit("second", 20, 10)
    tenants = onlooker.policy.tenants
    assert tenants["second"].virtual_service == tenants["first"].virtual_service == 40


@pytest.mark.parametrize("policy", FAIR_POLICIES)
def test_a_short_prompt_goes_before_the_rest_of_a_long_one(policy: str) -> None:
    onlooker = Onlooker(policy=policy, enable_overlap=False, max_num_seqs=8)
    for _ in range(6):
        onlooker.submit("flood", 200, 4)
    for _ in range(3):
        onlooker.step()
    chat = onlooker.submit("chat", 12, 4)
    onlooker.step()
    assert chat in {scheduled.request_id for scheduled in onlooker.executor.batches[-1].requests}


def test_what_is_found_in_the_cache_is_not_charged() -> None:
    onlooker = Onlooker(policy="fair")
    onlooker.submit("a", 40, 1, token_id=5)
    onlooker.run()
    onlooker.submit("a", 40, 1, token_id=5)
    onlooker.run()
    assert onlooker.policy.tenants["a"].service == 40 + 4 + 2 * OUTPUT_TOKEN_SERVICE
