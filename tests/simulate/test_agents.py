"""Agents on virtual time, under every policy that the engine has."""

from dataclasses import replace

import pytest

from pelton.bench.agent_report import AgentReport, make_agent_report
from pelton.bench.agent_run import AgentRecord
from pelton.bench.agents import AGENT_WORKLOADS, Spread, all_turns, plan_agents
from pelton.build import build_simulated_server
from pelton.engine.config import EngineConfig
from pelton.engine.policies import POLICIES
from pelton.simulate.agents import run_agents
from pelton.simulate.clock import VirtualClock, run_virtual
from pelton.simulate.cost import COSTS

WORKLOAD = replace(
    AGENT_WORKLOADS["coding-small"], num_agents=10, num_concurrent=5, num_turns=Spread(6, 0.3), tenants=("a", "b")
)
COST = COSTS["h100-8b"]


def simulate(policy: str, num_kv_blocks: int, seed: str = "s") -> tuple[AgentReport, list[AgentRecord]]:
    config = EngineConfig(scheduling_policy=policy, num_kv_blocks=num_kv_blocks)
    clock = VirtualClock()

    async def run() -> list[AgentRecord]:
        return await run_agents(
            build_simulated_server(config, COST), plan_agents(WORKLOAD, seed), WORKLOAD.num_concurrent
        )

    records = run_virtual(run(), clock)
    return make_agent_report(WORKLOAD.name, WORKLOAD.num_concurrent, records, clock.now_s()), records


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_brings_all_agents_home_under_pressure(policy: str) -> None:
    report, _ = simulate(policy, num_kv_blocks=400)
    assert (report.num_agents, report.num_errors) == (10, 0)
    assert report.num_turns == sum(1 for _ in all_turns(plan_agents(WORKLOAD, "s")))


def test_memory_decides_what_is_computed_again() -> None:
    ample, _ = simulate("fcfs", num_kv_blocks=20_000)
    scarce, _ = simulate("fcfs", num_kv_blocks=200)
    # With room for all, only what does not fill a block is computed again.
    assert ample.num_recomputed_tokens is not None
    assert scarce.num_recomputed_tokens is not None
    assert ample.num_recomputed_tokens <= 16 * ample.num_turns
    assert scarce.num_recomputed_tokens > 5 * ample.num_recomputed_tokens
    assert ample.num_prompt_tokens == scarce.num_prompt_tokens
    assert scarce.completion_mean_s is not None
    assert ample.completion_mean_s is not None
    assert scarce.completion_mean_s > ample.completion_mean_s


def test_times_add_up() -> None:
    _, records = simulate("fcfs", num_kv_blocks=20_000)
    for record in records:
        on_the_way = [turn for turn in record.turns if turn.call.session_id == record.plan.agent_id]
        served_s = sum(turn.record.elapsed_s for turn in on_the_way)
        assert record.pause_s == pytest.approx(
            sum(turn.pause_s for turn in record.plan.turns[:-1] if not turn.forks), abs=1e-6
        )
        if not any(turn.forks for turn in record.plan.turns):
            assert record.completion_s == pytest.approx(served_s + record.pause_s, abs=1e-6)
        else:
            assert record.completion_s > served_s + record.pause_s


def test_the_same_seed_gives_the_same_world() -> None:
    first, second, other = simulate("fcfs", 300), simulate("fcfs", 300), simulate("fcfs", 300, seed="t")
    assert first[0] == second[0]
    assert first[0] != other[0]
