"""`pelton simulate`: the production scheduler and KV cache on virtual time, over a cost function."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from pelton.cli.flags import with_settings
from pelton.cli.settings import all_settings, parse_text, resolve_settings
from pelton.core.errors import ConfigError

if TYPE_CHECKING:
    from pelton.bench.agent_report import AgentReport
    from pelton.bench.agents import AgentWorkload
    from pelton.engine.config import EngineConfig
    from pelton.simulate.cost import StepCost
    from pelton.simulate.report import ReplayReport
    from pelton.simulate.trace import ReplayPlan, TraceRequest

app = App(name="simulate", help="Run the scheduler and the KV cache on virtual time.")

CostFlag = Annotated[str, Parameter(help="what steps cost: h100-8b, 4xh100-8b, or a file of `simulate calibrate`")]
PoliciesFlag = Annotated[
    str | None, Parameter(help="several in turn, such as fcfs,fair; instead of --scheduling-policy")
]
JsonFlag = Annotated[bool, Parameter(name="--json", negative=(), help="print one JSON document instead of a table")]
SeedFlag = Annotated[int, Parameter(help="seed of what is drawn")]

_REPLAY_COLUMNS = (
    ("requests", "num_requests"),
    ("virtual s", "virtual_s"),
    ("wall s", "wall_s"),
    ("busy", "busy_share"),
    ("steps", "num_steps"),
    ("prompt", "num_prompt_tokens"),
    ("output", "num_output_tokens"),
    ("cached", "cached_share"),
    ("preempted", "num_preemptions"),
    ("recomputed", "num_recomputed_tokens"),
    ("TTFT p50 s", "ttft_p50_s"),
    ("p99 s", "ttft_p99_s"),
    ("TPOT p50 ms", "tpot_p50_ms"),
    ("p99 ms", "tpot_p99_ms"),
    ("errors", "num_errors"),
)


def _with_engine_settings(command: Any) -> Any:
    return app.command(with_settings(("engine",))(command))


@_with_engine_settings
def trace(
    *,
    file: Annotated[Path, Parameter(help="a Mooncake trace: JSON lines with timestamp, lengths and hash_ids")],
    cost: CostFlag = "4xh100-8b",
    duration_s: Annotated[float | None, Parameter(help="only the first seconds of the trace")] = None,
    speed: Annotated[float, Parameter(help="2 lets requests arrive twice as fast")] = 1.0,
    num_tenants: Annotated[int, Parameter(help="tenants that the sessions of the trace are dealt to")] = 1,
    policies: PoliciesFlag = None,
    seed: SeedFlag = 0,
    as_json: JsonFlag = False,
    **settings: Any,
) -> int:
    """Replay a trace with its shared prefixes; an hour of traffic takes less than a minute."""
    from pelton.simulate.cost import load_cost
    from pelton.simulate.trace import ReplayPlan, read_trace

    requests = read_trace(file, duration_s=duration_s)
    plan = ReplayPlan(speed=speed, num_tenants=num_tenants, seed=seed)
    step_cost = load_cost(cost)
    reports = {}
    for config in _configs(settings, policies):
        reports[config.scheduling_policy] = _replay(config, step_cost, requests, plan)
        _say(f"{config.scheduling_policy}: {reports[config.scheduling_policy].wall_s} s")
    if as_json:
        print(
            json.dumps({"cost": cost, "reports": {name: asdict(report) for name, report in reports.items()}}, indent=1)
        )
    else:
        _print_rows("policy", list(reports.items()), _REPLAY_COLUMNS)
    return 1 if any(report.num_errors for report in reports.values()) else 0


@_with_engine_settings
def agents(
    *,
    workload: Annotated[str, Parameter(help="coding, coding-small or smoke")] = "coding",
    cost: CostFlag = "h100-8b",
    num_agents: Annotated[int | None, Parameter(help="agents in all; default: the workload's")] = None,
    loads: Annotated[str | None, Parameter(help="agents at a time, such as 2,8,24; default: the workload's")] = None,
    policies: PoliciesFlag = None,
    seed: SeedFlag = 0,
    as_json: JsonFlag = False,
    **settings: Any,
) -> int:
    """Run agents with tool pauses and forks, as `pelton bench agents` does against a server."""
    from pelton.bench.agents import select_agent_workload
    from pelton.cli.bench_agents import agent_table, parse_loads, print_agent_json
    from pelton.cli.tables import print_table
    from pelton.simulate.cost import load_cost

    chosen = select_agent_workload(workload, agents=num_agents)
    step_cost = load_cost(cost)
    rows = []
    for load in parse_loads(loads) or (chosen.num_concurrent,):
        for config in _configs(settings, policies):
            report = _run_agents(config, step_cost, replace(chosen, num_concurrent=load), f"{seed}/{load}")
            _say(f"{config.scheduling_policy}, {load} at a time: jobs take {report.completion_mean_s} s")
            rows.append((config.scheduling_policy, report))
    if as_json:
        names = [name for name, _ in rows]
        print_agent_json([report for _, report in rows], {"workload": asdict(chosen), "cost": cost, "policies": names})
    else:
        print_table(agent_table(rows))
    return 1 if any(report.num_errors for _, report in rows) else 0


@app.command
def calibrate(
    *step_logs: Annotated[Path, Parameter(help="files that `pelton serve --step-log FILE` wrote under mixed load")],
    output: Annotated[Path, Parameter(help="the cost file to write")],
    name: Annotated[str | None, Parameter(help="of the machine and model; default: the file's name")] = None,
    num_kv_tokens: Annotated[int, Parameter(help="KV cache of that machine, in tokens")] = 65536,
    kv_bytes_per_token: Annotated[int, Parameter(help="bytes of a token's KV, over all layers")] = 131_072,
) -> int:
    """Fit a cost function to the steps of a real server, and tell its error on steps that the fit did not see."""
    from pelton.cli.environment import describe_machine
    from pelton.simulate.cost import save_cost
    from pelton.simulate.fit import fit_cost
    from pelton.simulate.step_log import read_step_log

    steps = read_step_log(step_logs)
    machine = describe_machine()
    cost, error = fit_cost(
        steps, name or output.stem, num_kv_tokens, kv_bytes_per_token, f"fit of {len(steps)} measured steps"
    )
    save_cost(cost, output, error=asdict(error), machine=machine)
    print(
        f"{output}: {len(steps)} steps; error of a step's time {error.median:.1%} median, {error.p90:.1%} p90; "
        f"of the sum {error.total:+.1%} ({error.num_steps} steps unseen by the fit)"
    )
    return 0


def _configs(settings: dict[str, Any], policies: str | None) -> list[EngineConfig]:
    config = resolve_settings(settings, os.environ).engine
    if not policies:
        return [config]
    setting = all_settings()["scheduling_policy"]
    try:
        return [replace(config, scheduling_policy=parse_text(setting, policy)) for policy in policies.split(",")]
    except ValueError as error:
        raise ConfigError(f"policies: {error}") from None


def _replay(config: EngineConfig, cost: StepCost, requests: list[TraceRequest], plan: ReplayPlan) -> ReplayReport:
    from pelton.build import build_simulated_server
    from pelton.simulate.clock import VirtualClock, run_virtual
    from pelton.simulate.report import make_replay_report
    from pelton.simulate.trace import replay

    # Nothing of a replay is refused for want of a place in the queue.
    config = replace(config, max_num_waiting=max(config.max_num_waiting, len(requests)))
    clock = VirtualClock()
    gc.collect()
    gc.freeze()  # prompts by the million, none of them in a cycle
    started_s = time.perf_counter()

    async def run() -> ReplayReport:
        server = build_simulated_server(config, cost)
        records = [record for _, record in await replay(server, requests, plan)]
        return make_replay_report(server, records, clock.now_s(), time.perf_counter() - started_s)

    return run_virtual(run(), clock)


def _run_agents(config: EngineConfig, cost: StepCost, workload: AgentWorkload, seed: str) -> AgentReport:
    from pelton.bench.agent_report import make_agent_report
    from pelton.bench.agents import plan_agents
    from pelton.build import build_simulated_server
    from pelton.simulate.agents import run_agents
    from pelton.simulate.clock import VirtualClock, run_virtual

    clock = VirtualClock()

    async def run() -> AgentReport:
        server = build_simulated_server(config, cost)
        records = await run_agents(server, plan_agents(workload, seed), workload.num_concurrent)
        return make_agent_report(workload.name, workload.num_concurrent, records, clock.now_s())

    return run_virtual(run(), clock)


def _print_rows(title: str, rows: list[tuple[str, Any]], columns: tuple[tuple[str, str], ...]) -> None:
    from rich.table import Table

    from pelton.cli.tables import format_figure, print_table

    table = Table(box=None, header_style="bold")
    table.add_column(title)
    for heading, _ in columns:
        table.add_column(heading, justify="right")
    for name, report in rows:
        table.add_row(name, *(format_figure(getattr(report, attribute)) for _, attribute in columns))
    print_table(table)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
