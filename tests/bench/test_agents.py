"""Agent plans, and their run against a server that answers at once."""

import itertools
from dataclasses import replace

import pytest

from pelton.bench.agent_bench import AgentBenchPlan, run_agent_bench
from pelton.bench.agent_report import AgentReport
from pelton.bench.agents import (
    AGENT_WORKLOADS,
    AgentWorkload,
    Spread,
    all_pieces,
    all_turns,
    plan_agents,
    select_agent_workload,
)
from pelton.bench.errors import BenchError
from pelton.bench.report import percentile
from pelton.bench.run import Server
from pelton.core.errors import ConfigError
from tests.bench.server import FakeServer, running

SMALL = replace(AGENT_WORKLOADS["smoke"], num_agents=4, fork_share=1.0, num_output_tokens=Spread(16, 0.0))


def bodies(server: FakeServer) -> list[tuple[dict[str, object], dict[str, str]]]:
    """Of turns: warm-ups and looks at the server ask for fewer tokens."""
    return [(b, h) for b, h in zip(server.bodies, server.headers, strict=True) if b["max_tokens"] == 16]


async def bench(server: FakeServer, workload: AgentWorkload = SMALL, *, send_identity: bool = False) -> AgentReport:
    plan = AgentBenchPlan(workload=workload, loads=(workload.num_concurrent,), send_identity=send_identity)
    reports = await run_agent_bench(
        Server(name="s", base_url=server.base_url), plan, lambda *_: None, lambda _report: None
    )
    return reports[0]


@pytest.mark.parametrize("name", sorted(AGENT_WORKLOADS))
def test_plans_follow_from_their_seed(name: str) -> None:
    workload = AGENT_WORKLOADS[name]
    plans = plan_agents(workload, "1")
    assert plans == plan_agents(workload, "1")
    pieces = [piece.piece_id for piece in all_pieces(plans)]
    assert len(pieces) == len(set(pieces))
    assert not set(pieces) & {piece.piece_id for piece in all_pieces(plan_agents(workload, "2"))}
    assert len(plans) == workload.num_agents
    for plan in plans:
        assert plan.system is not None
        num_tokens = plan.system.num_tokens + sum(t.new.num_tokens + t.num_output_tokens for t in plan.turns)
        assert num_tokens <= workload.max_prompt_tokens
        assert plan.turns


def test_coding_agents_are_as_published() -> None:
    workload = replace(AGENT_WORKLOADS["coding"], num_agents=400)
    plans = plan_agents(workload, "x")
    turns = list(all_turns(plans))
    own = [turn for plan in plans for turn in plan.turns]
    assert 30 <= (percentile([len(plan.turns) for plan in plans], 50) or 0) <= 46
    mean_output = sum(turn.num_output_tokens for turn in turns) / len(turns)
    assert 380 < mean_output < 500
    pauses = [turn.pause_s for turn in turns]
    assert 0.83 < sum(pause < 1 for pause in pauses) / len(pauses) < 0.90
    assert 0.94 < sum(pause < 10 for pause in pauses) / len(pauses) < 0.98
    assert 0.35 < sum(any(turn.forks for turn in plan.turns) for plan in plans) / len(plans) < 0.5
    seen = total = 0
    for plan in plans:
        num_tokens = workload.num_system_tokens
        for turn in plan.turns:
            seen, total = seen + num_tokens, total + num_tokens + turn.new.num_tokens
            num_tokens += turn.new.num_tokens + turn.num_output_tokens
    assert seen / total > 0.94
    assert len(own) < len(turns)


async def test_prompts_grow_and_forks_start_from_their_parents() -> None:
    async with running(FakeServer()) as server:
        report = await bench(server, send_identity=True)
    assert (report.num_agents, report.num_errors) == (4, 0)
    by_session: dict[str, list[str]] = {}
    for body, headers in bodies(server):
        assert headers["X-Tenant-Id"] == "default"
        assert body["prompt_cache_key"] == headers["X-Session-Id"]
        assert headers["X-Session-Id"].startswith(headers["X-Program-Id"])
        by_session.setdefault(headers["X-Session-Id"], []).append(str(body["prompt"]))
    forks = [session for session in by_session if "fork" in session]
    assert (len(by_session), len(forks)) == (4 + 8, 8)
    for prompts in by_session.values():
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(prompts))
    for session in forks:
        parents = by_session[session.partition("/fork")[0]]
        assert any(by_session[session][0].startswith(prompt) for prompt in parents)
    assert len({prompt[:200] for prompts in by_session.values() for prompt in prompts}) == 1  # one system prompt
    assert report.num_turns == sum(map(len, by_session.values()))
    assert report.num_output_tokens == 16 * report.num_turns


async def test_no_more_agents_at_a_time_than_asked_for_and_nobody_is_named_unasked() -> None:
    async with running(FakeServer(delay_s=0.001)) as server:
        await bench(server, replace(SMALL, num_agents=6, num_concurrent=3, fork_share=0.0))
    assert server.most_running == 3
    assert not any(name.startswith("X-") for _, headers in bodies(server) for name in headers)
    assert not any("prompt_cache_key" in body for body, _ in bodies(server))


async def test_seen_and_recomputed_tokens_are_the_servers_own_counts() -> None:
    """The fake server always says that 3 tokens were cached."""
    workload = replace(SMALL, num_agents=1, num_concurrent=1, fork_share=0.0, num_turns=Spread(3, 0.0))
    async with running(FakeServer()) as server:
        report = await bench(server, workload)
    lengths = [len(server.tokens(str(body["prompt"]))) for body, _ in bodies(server)]
    assert report.num_prompt_tokens == sum(lengths)
    assert report.num_seen_tokens == lengths[0] + lengths[1]
    assert report.num_recomputed_tokens == lengths[0] - 3 + lengths[1] - 3
    assert report.num_cached_tokens == 9


async def test_an_agent_gives_up_at_its_first_error() -> None:
    async with running(FakeServer(fault="status", fail_every=4)) as server:
        report = await bench(server, replace(SMALL, fork_share=0.0, num_agents=6))
    assert 0 < report.num_errors < 6
    assert report.first_error == "HTTP 503: queue is full"


async def test_a_server_that_fails_all_turns_is_an_error() -> None:
    async with running(FakeServer(fault="status")) as server:
        with pytest.raises(BenchError, match="every turn failed; the first: HTTP 503: queue is full"):
            await bench(server)


def test_what_cannot_be_run_is_told() -> None:
    with pytest.raises(ConfigError, match="there is no agent workload 'x'"):
        select_agent_workload("x")
    with pytest.raises(ConfigError, match="must be at least 1"):
        select_agent_workload("smoke", agents=-1)
    with pytest.raises(ConfigError, match="must be between 0 and 1"):
        replace(SMALL, fork_share=1.5)
    with pytest.raises(ConfigError, match="loads and passes"):
        AgentBenchPlan(workload=SMALL, loads=(0,))
