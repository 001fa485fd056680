"""Agents against one server: connect, make texts, run each load, report."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from pelton.bench.agent_http import HttpAgentTarget, make_texts
from pelton.bench.agent_report import AgentReport, make_agent_report
from pelton.bench.agent_run import AgentRecord, AgentRunner
from pelton.bench.agents import AgentWorkload, all_pieces, all_turns, plan_agents
from pelton.bench.client import ServerClient
from pelton.bench.errors import BenchError
from pelton.bench.run import Progress, Server
from pelton.bench.tokenize import make_prompt_maker
from pelton.bench.workloads import WARM_UP, PromptMaker
from pelton.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentBenchPlan:
    """`loads` are numbers of concurrent agents, each run `num_passes` times with prompts of its own."""

    workload: AgentWorkload
    loads: tuple[int, ...]
    num_passes: int = 1
    seed: int = 0
    send_identity: bool = False
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if not self.loads or min(self.loads) < 1 or self.num_passes < 1:
            raise ConfigError("loads and passes must be at least 1")


async def run_agent_bench(
    server: Server, plan: AgentBenchPlan, progress: Progress, on_report: Callable[[AgentReport], None]
) -> list[AgentReport]:
    """A report for every pass of every load. Raises `BenchError` where not one turn succeeded."""
    reports = []
    async with ServerClient(
        server.base_url, model=server.model, api_key=server.api_key, timeout_s=plan.timeout_s
    ) as client:
        progress("looking", 0, 1)
        await client.prepare()
        maker = await make_prompt_maker([client])
        for prompt in await maker.make_prompts(WARM_UP, f"{plan.seed}/warm-up"):
            await client.complete(prompt, WARM_UP.num_output_tokens)
        for number in range(plan.num_passes):
            for load in plan.loads:
                workload = replace(plan.workload, num_concurrent=load)
                seed = f"{plan.seed}/{number}/{load}"
                report, _ = await run_agent_load(
                    client, maker, workload, seed, progress, send_identity=plan.send_identity
                )
                on_report(report)
                reports.append(report)
    return reports


async def run_agent_load(
    client: ServerClient,
    maker: PromptMaker,
    workload: AgentWorkload,
    seed: str,
    progress: Progress,
    *,
    send_identity: bool = False,
) -> tuple[AgentReport, list[AgentRecord]]:
    """One run of a workload on a prepared client."""
    plans = plan_agents(workload, seed)
    line = f"{workload.name}, {workload.num_concurrent} at a time"
    num_turns = sum(1 for _ in all_turns(plans))
    progress(f"{line}: making texts", 0, num_turns)
    texts = await make_texts(maker, list(all_pieces(plans)))
    target = HttpAgentTarget(client, texts, send_identity=send_identity)
    runner = AgentRunner(target, lambda num_done: progress(line, num_done, num_turns))
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    records = await runner.run(plans, workload.num_concurrent)
    report = make_agent_report(workload.name, workload.num_concurrent, records, loop.time() - start_s)
    if report.num_turns == 0:
        raise BenchError(f"{client.base_url}: every turn failed; the first: {report.first_error}")
    return report, records
