"""Sessions through a whole engine: who continues whom, what is pinned and for how long, and what tenants see."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pelton.core.errors import DeadlineUnreachableError, QueueFullError, TenantLimitError
from pelton.core.events import EventKind
from pelton.core.model_spec import KVGroupSpec
from pelton.core.request import Submission
from pelton.core.session import SessionInfo
from pelton.engine.engine import Engine
from pelton.engine.kv.pins import PinEnd
from pelton.engine.pauses import PauseTimes
from pelton.engine.policies import POLICIES
from pelton.engine.sessions import GONE_AFTER_S, MAX_IDLE_S, MAX_SESSIONS, MAX_TURNS_KEPT
from tests.make import FULL_ATTENTION, ManualClock, check_ledger, generate, make_engine, make_submission, run, step

WINDOWED = (KVGroupSpec((0,)), KVGroupSpec((1,), 9))


class Agent:
    """Sends turns as an agent does: all that was said before, the answer, and something new."""

    def __init__(self, engine: Engine, prompt: list[int], **who: Any) -> None:
        self.engine = engine
        self.context = prompt
        self.who = who

    def turn(self, new: list[int] = [], **options: Any) -> str:  # noqa: B006
        """One turn to its end; the request's id."""
        self.context = self.context + new
        submission = make_submission(self.context, **(self.who | options))
        self.context = self.context + generate(self.engine, submission)[submission.request_id, 0]
        return submission.request_id


def slow_engine(**options: Any) -> Engine:
    """An engine on a manual clock whose prefill takes a second a token, so that keeping KV pays."""
    engine = make_engine(clock=ManualClock(), **options)
    engine.tenancy.costs.prefill.observe(100, 0.0, 100.0)
    return engine


def only_session(engine: Engine, tenant_id: str = "default") -> SessionInfo:
    (info,) = engine.tenancy.sessions.infos(tenant_id)
    return info


def wait(engine: Engine, seconds: float) -> None:
    engine.clock.time_s += seconds  # type: ignore[attr-defined]
    engine.expire()
    check_ledger(engine)


# -- who is it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", [{}, {"session_id": "s"}], ids=["inferred", "named"])
def test_turns_of_a_conversation_are_one_session(who: dict[str, Any]) -> None:
    engine = slow_engine()
    agent = Agent(engine, list(range(10)), **who)
    for _ in range(3):
        agent.turn([1, 2, 3, 4, 5])
    info = only_session(engine)
    assert (info.num_turns, info.num_running, info.is_inferred) == (3, 0, not who)
    assert info.session_id == (who.get("session_id") or info.program_id)
    assert info.num_context_tokens == len(agent.context)


def test_another_prompt_is_another_session() -> None:
    engine = slow_engine()
    shared = list(range(12))  # a system prompt, say
    for ending in ([50] * 6, [51] * 6, [52]):
        generate(engine, make_submission(shared + ending))
    assert [info.num_turns for info in engine.tenancy.sessions.infos("default")] == [1, 1, 1]


def test_the_same_prompt_again_is_no_next_turn() -> None:
    engine = slow_engine()
    for _ in range(2):
        generate(engine, make_submission(range(20)))
    assert len(engine.tenancy.sessions) == 2


def test_the_output_may_be_rendered_in_another_way() -> None:
    engine = slow_engine()
    generate(engine, make_submission(range(20)))
    generate(engine, make_submission([*range(20), 7, 7, 7, 7, 7, 7, 7]))
    assert only_session(engine).num_turns == 2


def test_a_second_continuation_is_a_fork_of_the_same_program() -> None:
    engine = slow_engine()
    agent = Agent(engine, list(range(20)))
    agent.turn()
    at_fork = agent.context
    agent.turn([1] * 5)
    Agent(engine, at_fork).turn([2] * 5)
    main, fork = sorted(engine.tenancy.sessions.infos("default"), key=lambda info: -info.num_turns)
    assert (main.num_turns, fork.num_turns) == (2, 1)
    assert fork.program_id == main.program_id
    assert fork.session_id != main.session_id


def test_a_sub_agent_with_a_session_of_its_own_joins_the_program() -> None:
    engine = slow_engine()
    agent = Agent(engine, list(range(20)), session_id="main")
    agent.turn()
    Agent(engine, agent.context, session_id="sub").turn([2] * 5)
    Agent(engine, [9] * 20, session_id="apart").turn()
    Agent(engine, [8] * 20, session_id="told", program_id="main").turn()
    programs = {info.session_id: info.program_id for info in engine.tenancy.sessions.infos("default")}
    assert programs == {"main": "main", "sub": "main", "apart": "apart", "told": "main"}


def test_an_earlier_answer_names_the_session_within_its_tenant() -> None:
    engine = slow_engine()
    request_id = Agent(engine, list(range(8)), session_id="s", tenant_id="a").turn()
    for tenant_id in ("a", "b"):
        generate(engine, make_submission([99] * 9, tenant_id=tenant_id, previous_request_id=request_id))
    assert only_session(engine, "a").num_turns == 2
    assert only_session(engine, "b").is_inferred
    assert only_session(engine, "b").num_turns == 1


def test_tenants_of_one_salt_still_do_not_meet() -> None:
    engine = slow_engine()
    prompt = list(range(20))
    Agent(engine, prompt, tenant_id="a", session_id="s").turn()
    Agent(engine, [*prompt, 1, 2, 3], tenant_id="b", session_id="s").turn()
    Agent(engine, [*prompt, 1, 2, 3], tenant_id="c").turn()
    assert [only_session(engine, tenant_id).num_turns for tenant_id in "abc"] == [1, 1, 1]
    assert only_session(engine, "c").program_id != "s"
    assert not engine.tenancy.sessions.delete("c", "s")
    assert engine.tenancy.sessions.delete("a", "s")
    assert not engine.tenancy.sessions.infos("a")
    assert only_session(engine, "b").session_id == "s"


def test_requests_carry_session_and_program_to_the_policy() -> None:
    engine = slow_engine()
    engine.clock.time_s = 5.0  # type: ignore[attr-defined]
    agent = Agent(engine, list(range(20)), program_id="p")
    agent.turn()
    engine.clock.time_s = 9.0  # type: ignore[attr-defined]
    engine.submit(make_submission([*agent.context, 1], "next", n=2))
    for request in [engine.scheduler.requests["next#0"], *engine._forks["next#0"]]:
        assert (request.program_id, request.program_arrival_s, request.session_id) == ("p", 5.0, "auto-1")
    run(engine)


def test_parallel_conversations_under_one_name_keep_their_own_pins() -> None:
    engine = slow_engine()
    agents = [Agent(engine, [first] * 12, session_id="shared-key") for first in (1, 2, 3)]
    for agent in agents:
        agent.turn()
    assert len(engine.tenancy.pins) == 3
    agents[0].turn([5] * 5)
    assert engine.tenancy.pins.num_ended == {PinEnd.SUPERSEDED: 1}
    assert len(engine.tenancy.pins) == 3


# -- pins ---------------------------------------------------------------------------------------------


def test_kv_survives_a_pause_under_pressure_only_while_pinned() -> None:
    """16 blocks of 4: the agent's context and a stranger's cannot both stay."""
    for named in (True, False):
        engine = slow_engine(num_blocks=17)
        agent = Agent(engine, list(range(24)), **({"session_id": "s"} if named else {}))
        agent.turn()
        for first in range(50, 54):  # take what is free, then what is only cached
            generate(engine, make_submission([first] * 20))
        submission = make_submission([*agent.context, 1])
        engine.submit(submission)
        cached = [output.usage.num_cached_tokens for output in run(engine) if output.usage]
        assert cached == [28 if named else 0], "full blocks of 24 + 7 computed tokens"


def test_the_pin_lasts_for_the_time_computed() -> None:
    engine = slow_engine()
    agent = Agent(engine, list(range(20)), session_id="s")
    agent.turn()
    # Nothing is known: ln(PR), PR = 27 tokens of one second each (the last of 28 was never computed).
    assert only_session(engine).pin_expires_in_s == pytest.approx(math.log(27.0), rel=1e-6)
    assert engine.next_deadline_s == pytest.approx(math.log(27.0), rel=1e-6)
    num_used = engine.stats().num_blocks_used
    assert num_used == 6
    wait(engine, math.log(27.0) + 0.001)
    assert only_session(engine).pin_expires_in_s is None
    assert engine.stats().num_blocks_used == 0
    assert engine.next_deadline_s is None
    assert engine.tenancy.pins.num_ended == {PinEnd.EXPIRED: 1}


def test_a_hung_tool_frees_its_kv_by_the_time_learned_from_others() -> None:
    engine = slow_engine(num_blocks=1024)
    engine.tenancy.sessions.pauses = PauseTimes(min_observations=10)
    for index in range(6):
        agent = Agent(engine, [index] * 20, session_id=f"s{index}")
        agent.turn()
        for _ in range(2):
            wait(engine, 3.0)
            agent.turn([50] * 5, tool_names=("bash",))
    info = engine.tenancy.sessions.infos("default")[0]
    assert info.pin_expires_in_s == pytest.approx(3.0)
    wait(engine, 3.0)
    assert len(engine.tenancy.pins) == 0
    assert engine.stats().num_blocks_used == 0


def test_tools_that_take_too_long_are_not_waited_for() -> None:
    engine = slow_engine(num_blocks=1024)
    engine.tenancy.sessions.pauses = PauseTimes(min_observations=10)
    agent = Agent(engine, [1] * 20, session_id="s")
    for _ in range(12):
        agent.turn([50] * 2)
        wait(engine, 500.0)
    agent.turn([50] * 2)
    assert len(engine.tenancy.pins) == 0


def test_sessions_that_end_are_not_waited_for() -> None:
    engine = slow_engine(num_blocks=1024)
    engine.tenancy.sessions.pauses = PauseTimes(min_observations=10)
    for index in range(12):
        Agent(engine, [index] * 20, session_id=f"s{index}").turn()
    wait(engine, GONE_AFTER_S + 1)
    Agent(engine, [77] * 20, session_id="another").turn()
    assert len(engine.tenancy.pins) == 0


def test_a_first_turn_without_a_name_is_not_pinned_and_a_second_is() -> None:
    engine = slow_engine()
    agent = Agent(engine, list(range(20)))
    agent.turn()
    assert len(engine.tenancy.pins) == 0
    agent.turn([1] * 5)
    assert len(engine.tenancy.pins) == 1


def test_the_next_turn_takes_over_when_it_is_admitted() -> None:
    engine = slow_engine()
    agent = Agent(engine, list(range(20)), session_id="s")
    agent.turn()
    engine.submit(make_submission([*agent.context, 1], "next", session_id="s"))
    assert len(engine.tenancy.pins) == 1
    wait(engine, 100.0)  # it waits: the pin outlives its time
    assert len(engine.tenancy.pins) == 1
    step(engine)
    assert len(engine.tenancy.pins) == 0
    assert engine.tenancy.pins.num_ended == {PinEnd.SUPERSEDED: 1}
    run(engine)


def test_a_cancelled_next_turn_gives_the_pin_back_to_its_time() -> None:
    engine = slow_engine()
    agent = Agent(engine, list(range(20)), session_id="s")
    agent.turn()
    engine.submit(make_submission([*agent.context, 1], "next", session_id="s"))
    engine.cancel("next")
    engine.take_update()
    assert len(engine.tenancy.pins) == 1
    assert only_session(engine).num_running == 0
    wait(engine, 100.0)
    assert len(engine.tenancy.pins) == 0
    agent.turn([1])
    assert only_session(engine).num_turns == 2


def test_deleting_a_session_ends_its_pins_and_not_its_requests() -> None:
    engine = slow_engine()
    agent = Agent(engine, list(range(20)), session_id="s")
    agent.turn()
    engine.submit(make_submission([*agent.context, 1], "next", session_id="s"))
    step(engine)
    assert engine.tenancy.sessions.delete("default", "s")
    assert not engine.tenancy.sessions.delete("default", "s")
    outputs = run(engine)
    assert outputs[-1].finish_reason == "length"
    assert len(engine.tenancy.pins) == 0
    assert engine.stats().num_blocks_used == 0
    assert not engine.tenancy.sessions.infos("default")


def test_a_cache_full_of_pins_still_progresses() -> None:
    engine = slow_engine(num_blocks=33, tenants=["*:max_pin_share=1"])
    for index in range(4):
        Agent(engine, [index] * 24, session_id=f"s{index}", max_tokens=5).turn()
    assert engine.stats().num_blocks_used == 4 * 7
    # Nothing runs and 4 blocks are free: a stranger's prompt of 80 tokens needs most of the cache.
    token_ids = generate(engine, make_submission([99] * 80, "stranger"))
    assert len(token_ids["stranger", 0]) == 8
    assert engine.tenancy.pins.num_ended[PinEnd.YIELDED] == 3, "no more than needed"
    assert [info.session_id for info in engine.tenancy.sessions.infos("default") if info.num_pinned_blocks] == ["s0"]


def test_running_requests_are_not_preempted_for_pins() -> None:
    engine = slow_engine(num_blocks=17, tenants=["*:max_pin_share=1"])
    Agent(engine, [1] * 30, session_id="s", max_tokens=3).turn()
    assert engine.stats().num_blocks_used == 8
    generate(engine, make_submission([99] * 20, max_tokens=40))
    assert engine.scheduler.counters.num_preemptions == 0
    assert engine.tenancy.pins.num_ended == {PinEnd.YIELDED: 1}


def test_a_tenant_over_its_pin_quota_loses_its_own() -> None:
    engine = slow_engine(num_blocks=101, tenants=["greedy:max_pin_share=0.1", "*:max_pin_share=0.5"])
    Agent(engine, [200] * 20, session_id="kept", tenant_id="modest").turn()
    for index in range(5):
        Agent(engine, [index] * 16, session_id=f"s{index}", tenant_id="greedy", max_tokens=4).turn()
    assert engine.tenancy.pins.num_blocks("greedy") <= 10
    assert only_session(engine, "modest").num_pinned_blocks == 6


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_pins_are_charged_to_their_tenant(policy: str) -> None:
    engine = slow_engine(policy=policy)
    Agent(engine, list(range(20)), session_id="s", tenant_id="a").turn()
    (before,) = engine.tenancy.stats().service
    wait(engine, 2.0)
    (after,) = engine.tenancy.stats().service
    (info,) = engine.tenancy.stats().tenants
    assert info.num_pinned_blocks == 6
    assert info.pinned_block_s_total == 12.0
    assert after.service - before.service == 12.0


def test_the_timeline_tells_of_the_pin() -> None:
    engine = slow_engine()
    engine.submit(make_submission(range(20), session_id="s"))
    events = []
    while engine.has_work:
        engine.dispatch()
        engine.collect()
        update = engine.take_update()
        events += update.events if update is not None else []
    kinds = [event.kind for event in events]
    assert kinds[-2:] == [EventKind.PINNED, EventKind.FINISHED]
    assert float(events[-2].detail) == pytest.approx(math.log(27.0), abs=1e-3)


def test_without_prefix_caching_sessions_have_names_and_no_pins() -> None:
    engine = slow_engine(enable_prefix_caching=False)
    agent = Agent(engine, list(range(20)), session_id="s")
    agent.turn()
    agent.turn([1] * 5)
    assert only_session(engine).num_turns == 2
    assert len(engine.tenancy.pins) == 0


# -- bounds -------------------------------------------------------------------------------------------


def test_tables_are_bounded_and_a_flood_of_sessions_is_its_tenants_own_loss() -> None:
    engine = make_engine(clock=ManualClock())
    sessions = engine.tenancy.sessions
    Agent(engine, list(range(20)), session_id="kept", tenant_id="modest").turn()
    for index in range(MAX_SESSIONS + 50):
        submission = make_submission([1], session_id=f"s{index}", tenant_id="flood")
        engine.submit(submission)
        engine.cancel(submission.request_id)
    run(engine)
    assert len(sessions) == MAX_SESSIONS
    assert len(sessions.infos("modest")) == 1
    agent = Agent(engine, list(range(4)), session_id="kept", tenant_id="modest", max_tokens=1)
    for _ in range(MAX_TURNS_KEPT + 5):
        agent.turn([1])
    (kept,) = sessions._by_tenant["modest"].values()
    assert len(kept.turns) == MAX_TURNS_KEPT


def test_more_sessions_under_way_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pelton.engine.sessions.MAX_SESSIONS", 3)
    engine = make_engine(max_num_waiting=100)
    for index in range(12):
        engine.submit(make_submission([index] * 9))
    assert len(engine.tenancy.sessions) == 12, "those under way are bounded by the queue"
    run(engine)
    generate(engine, make_submission([99] * 9))
    assert len(engine.tenancy.sessions) == 3


def test_idle_sessions_are_forgotten_without_a_trace() -> None:
    engine = slow_engine()
    sessions = engine.tenancy.sessions
    for index in range(3):
        agent = Agent(engine, [index] * 20, session_id=f"s{index}", tenant_id=f"t{index}")
        agent.turn()
        agent.turn([1] * 5)
    wait(engine, MAX_IDLE_S + 1)
    assert len(sessions) == 0
    assert not sessions._by_tenant
    assert not sessions._programs
    assert not sessions._under_way
    assert not sessions._index._by_tip
    assert not sessions._index._by_request
    assert not sessions._open_turns


@pytest.mark.parametrize(
    ("tenants", "num_sent", "num_refused"),
    [
        (["a:max_num_running=2,max_num_waiting=3"], 8, 3),
        (["a:max_num_waiting=0"], 8, 0),  # as many as may run
        (["a:max_num_waiting=0"], 10, 2),
        (["*:max_num_waiting=1"], 10, 1),
    ],
)
def test_a_tenants_own_bound(tenants: list[str], num_sent: int, num_refused: int) -> None:
    engine = make_engine(tenants=tenants, max_num_seqs=8)
    for _ in range(num_sent):
        engine.submit(make_submission(range(9), tenant_id="a"))
    outputs = run(engine)
    errors = [output.error for output in outputs if output.error is not None]
    assert [error.code for error in errors] == [TenantLimitError.code] * num_refused
    assert all(error.retry_after_s and error.retry_after_s >= 1.0 for error in errors)
    engine.submit(make_submission(range(9), tenant_id="a"))
    assert all(output.error is None for output in run(engine)), "the bound is on what is there at one time"


def test_a_flood_leaves_places_for_others_once_there_are_others() -> None:
    engine = make_engine(clock=ManualClock(), max_num_seqs=1, max_num_waiting=20)

    def send(tenant_id: str) -> str | None:
        engine.submit(make_submission(range(9), tenant_id=tenant_id))
        update = engine.take_update()
        assert update is not None
        return next((output.error.code for output in update.outputs if output.error), None)

    assert [send("flood") for _ in range(21)] == [None] * 21, "alone, a tenant may take all"
    assert send("late") == QueueFullError.code
    for request_id in list(engine._submissions)[:8]:
        engine.cancel(request_id)
    engine.take_update()
    # 13 are there, 17 places are for everybody, 4 for those who have less than 3.
    assert [send("flood"), send("flood"), send("ally")] == [None] * 3
    assert [send("flood"), send("late"), send("late"), send("late"), send("flood"), send("ally"), send("ally")] == [
        *(None, None, None, TenantLimitError.code, TenantLimitError.code, None, TenantLimitError.code)
    ]
    assert [send("other"), send("other")] == [None, QueueFullError.code]


def test_a_deadline_out_of_reach_is_refused_at_once_and_only_then() -> None:
    engine = slow_engine(max_model_len=256, num_blocks=512)  # a second a token

    def send(num_tokens: int, timeout_s: float | None, first: int) -> tuple[str, float | None] | None:
        engine.submit(make_submission([first] * num_tokens, timeout_s=timeout_s))
        update = engine.take_update()
        assert update is not None
        return next(((out.error.code, out.error.retry_after_s) for out in update.outputs if out.error), None)

    assert send(100, None, 1) is None
    assert send(100, 250.0, 2) is None
    assert send(100, 250.0, 3) == (DeadlineUnreachableError.code, pytest.approx(50.0))
    assert send(49, 250.0, 4) is None
    for request_id in list(engine._submissions):
        engine.cancel(request_id)
    engine.take_update()
    assert send(100, 0.001, 5) is None, "an idle engine tries"
    assert send(100, 201.0, 6) is None, "what is gone is not waited for"


def test_a_few_slow_tokens_refuse_no_long_prompt() -> None:
    engine = make_engine(clock=ManualClock(), max_model_len=256, num_blocks=512)
    prefill = engine.tenancy.costs.prefill

    def send(first: int) -> str | None:
        engine.submit(make_submission([first] * 200, timeout_s=30.0))
        update = engine.take_update()
        assert update is not None
        return next((out.error.code for out in update.outputs if out.error), None)

    prefill.observe(3, 0.0, 2.0)  # the first step of a new engine
    assert [send(1), send(2)] == [None, None]
    prefill.observe(60, 0.0, 40.0)
    assert send(3) == DeadlineUnreachableError.code


def test_a_fair_queue_is_not_estimated_by_what_a_flood_has_queued() -> None:
    engine = slow_engine(num_blocks=1024)
    for index in range(8):
        engine.submit(make_submission([index] * 100, tenant_id="flood"))
    engine.submit(make_submission([50] * 10, tenant_id="b", timeout_s=20.0))
    engine.submit(make_submission([51] * 10, tenant_id="flood", timeout_s=20.0))
    update = engine.take_update()
    assert update is not None
    assert [output.error.code for output in update.outputs if output.error] == [DeadlineUnreachableError.code]


def test_cached_prompts_are_not_counted_as_work() -> None:
    engine = slow_engine(num_blocks=1024)
    prompt = list(range(100))
    generate(engine, make_submission(prompt))
    engine.submit(make_submission([*prompt, 1], timeout_s=10.0))
    assert all(output.error is None for output in run(engine))


# -- service ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["fcfs", "agent"])
def test_service_is_what_was_computed_and_the_gap_is_between_those_who_wait(policy: str) -> None:
    engine = make_engine(clock=ManualClock(), policy=policy, tenants=["b:weight=2"], num_blocks=1024, max_num_seqs=2)
    for tenant_id in "ab":
        for first in range(3):
            engine.submit(make_submission([first] * 20, tenant_id=tenant_id, cache_salt=tenant_id))
    gaps = []
    while engine.has_work:
        step(engine)
        gaps.append(engine.tenancy.stats().fairness_gap)
    service = {stats.tenant_id: stats.service for stats in engine.tenancy.stats().service}
    # 20 prompt tokens and 8 output tokens a request; no prompt repeats another.
    assert service == {"a": 3 * (20 + 16), "b": 3 * (20 + 16)}
    assert max(gaps) > 0.0
    assert gaps[-1] == 0.0


# -- and all of it together ---------------------------------------------------------------------------

TURN = st.tuples(
    st.integers(0, 5),  # agent
    st.integers(1, 12),  # new tokens
    st.floats(0, 40),  # pause before
    st.sampled_from(["go", "go", "go", "cancel", "delete"]),
)


@settings(max_examples=80, deadline=None)
@given(
    turns=st.lists(TURN, min_size=1, max_size=25),
    groups=st.sampled_from([FULL_ATTENTION, WINDOWED]),
    num_blocks=st.integers(20, 60),
    num_host_blocks=st.sampled_from([0, 12]),
    policy=st.sampled_from(["agent", "fcfs"]),
    enable_overlap=st.booleans(),
)
def test_random_agents_never_stall_and_answers_do_not_depend_on_pins(
    turns: list[tuple[int, int, float, str]],
    groups: tuple[KVGroupSpec, ...],
    num_blocks: int,
    num_host_blocks: int,
    policy: str,
    enable_overlap: bool,
) -> None:
    """Many turns at once in a small cache: all end, the ledger balances, the tokens are those of an empty engine."""
    engine = slow_engine(
        groups=groups,
        num_blocks=num_blocks * len(groups),
        num_host_blocks=num_host_blocks,
        policy=policy,
        max_model_len=72,
        tenants=["*:max_pin_share=0.9"],
        enable_overlap=enable_overlap,
    )
    engine.tenancy.costs.tiers = ()  # or nothing would be pinned
    contexts = {index: [index] * 9 for index in range(6)}
    sent: list[Submission] = []
    token_ids: dict[str, list[int]] = {}
    for index, num_new, pause_s, what in turns:
        contexts[index] = (contexts[index] + [100 + index] * num_new)[-60:]
        who: dict[str, Any] = {"tenant_id": f"t{index % 3}", "cache_salt": f"t{index % 3}"}
        if index % 2:
            who["session_id"] = f"s{index}"
        submission = make_submission(contexts[index], max_tokens=6, **who)
        engine.submit(submission)
        outputs = step(engine)
        if what == "cancel":
            engine.cancel(submission.request_id)
        elif what == "delete":
            engine.tenancy.sessions.delete(who["tenant_id"], f"s{index}")
        if what != "cancel":
            sent.append(submission)
        engine.clock.time_s += pause_s  # type: ignore[attr-defined]
        outputs += run(engine) if pause_s > 20 else step(engine)
        for output in outputs:
            token_ids.setdefault(output.request_id, []).extend(output.token_ids)
    for output in run(engine):
        token_ids.setdefault(output.request_id, []).extend(output.token_ids)
    for submission in sent:
        alone = make_engine(groups=groups, max_model_len=72)
        assert token_ids[submission.request_id] == generate(alone, submission)[submission.request_id, 0]
    wait(engine, MAX_IDLE_S * 2)
    assert engine.stats().num_blocks_used == 0
    assert not engine.tenancy._num_alive
    assert not engine.tenancy.load.num_waiting
    assert not engine.tenancy.load._pending_by_tenant
