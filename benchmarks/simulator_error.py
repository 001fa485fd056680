"""How far the simulator is from the live engine: calibrate on one run, then predict others.

    python benchmarks/simulator_error.py --model MODEL --flags "--num-kv-blocks 1025" --output error.json [--short]

Three starts of `pelton serve --step-log`: the first, under agents at several loads, gives the cost function; the second
answers agents with other prompts, load by load, and the same plans then run on virtual time over the same engine
settings; the error is (predicted - measured) / measured. `cost` beside `--output` is the fit, for `pelton simulate`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
from dataclasses import asdict, replace
from typing import Any

from agent_runs import StartedServer, add_server_arguments, open_results, run_on_server, say
from peers import Engine, Results

from pelton.bench.agent_report import AgentReport, make_agent_report
from pelton.bench.agents import AgentPlan, AgentWorkload, plan_agents, select_agent_workload
from pelton.build import PeltonConfig, build_simulated_server
from pelton.cli.environment import describe_machine
from pelton.cli.settings import all_settings, parse_text
from pelton.engine.config import EngineConfig
from pelton.simulate.agents import run_agents
from pelton.simulate.clock import VirtualClock, run_virtual
from pelton.simulate.cost import StepCost, save_cost
from pelton.simulate.fit import fit_cost, measure_error
from pelton.simulate.step_log import MeasuredStep, read_step_log

FIGURES = (
    "elapsed_s",
    "completion_mean_s",
    "completion_p95_s",
    "ttft_first_p50_ms",
    "ttft_p50_ms",
    "ttft_p95_ms",
    "tpot_p50_ms",
    "num_prompt_tokens",
    "num_cached_tokens",
)


def engine_config(flags: list[str]) -> EngineConfig:
    """The engine's settings among `flags`, each `--name value`."""
    settings = all_settings()
    values = {}
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        name = flag.removeprefix("--").replace("-", "_")
        values[name] = parse_text(settings[name], value)
    return PeltonConfig.of({name: value for name, value in values.items() if settings[name].room == "engine"}).engine


def workloads(args: argparse.Namespace) -> list[AgentWorkload]:
    base = select_agent_workload("smoke" if args.short else args.workload)
    loads = [int(load) for load in ("1,3" if args.short else args.loads).split(",")]
    return [replace(base, num_agents=max(4, round(1.5 * load)), num_concurrent=load) for load in loads]


async def drive_live(
    name: str, args: argparse.Namespace, results: Results
) -> tuple[dict[int, AgentReport], list[MeasuredStep]]:
    """Reports by load, and the steps, of a server of its own."""
    log = args.output.with_suffix(f".{name}.steps")
    command = [sys.executable, "-m", "pelton.cli.main", "serve", args.model, *shlex.split(args.flags)]
    command += ["--port", "{port}", "--log-level", "warning", "--step-log", str(log)]
    reports: dict[int, AgentReport] = {}

    async def drive(server: StartedServer) -> dict[str, Any]:
        for workload in workloads(args):
            load = workload.num_concurrent
            say(f"{name}: {workload.num_agents} agents, {load} at a time")
            records = await server.run(plan_agents(workload, f"{name}/{load}"), load)
            reports[load] = make_agent_report(workload.name, load, records, max(r.ended_s for r in records))
        return {}

    run = await run_on_server(Engine(name, tuple(command), True), args, results, 0, drive, 16)
    if run is None:
        raise SystemExit(f"{name}: {results.failures[-1]['error']}")
    results.runs.append({"engine": name, "round": 0, **run})
    return reports, read_step_log([log])


def simulate(workload: AgentWorkload, plans: list[AgentPlan], config: EngineConfig, cost: StepCost) -> AgentReport:
    clock = VirtualClock()

    async def run() -> AgentReport:
        records = await run_agents(build_simulated_server(config, cost), plans, workload.num_concurrent)
        return make_agent_report(workload.name, workload.num_concurrent, records, clock.now_s())

    return run_virtual(run(), clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_arguments(parser)
    parser.add_argument("--model", required=True)
    parser.add_argument("--flags", default="", help="of pelton serve; each with its value")
    parser.add_argument("--workload", default="coding-small")
    parser.add_argument("--loads", default="1,4,12")
    parser.add_argument("--kv-bytes-per-token", type=int, default=12_288, help="default: that of Qwen2.5 0.5B")
    args = parser.parse_args()
    args.tokenizer = args.tokenizer or args.model
    config = engine_config(shlex.split(args.flags))
    results = open_results(args, {})
    _, calibration = asyncio.run(drive_live("calibration", args, results))
    num_kv_tokens = (config.num_kv_blocks or 4096) * config.block_size
    cost, fit_error = fit_cost(
        calibration, args.output.stem, num_kv_tokens, args.kv_bytes_per_token, f"fit of {len(calibration)} live steps"
    )
    save_cost(cost, args.output.with_suffix(".cost.json"), error=asdict(fit_error), machine=describe_machine())
    measured, steps = asyncio.run(drive_live("measurement", args, results))
    document: dict[str, Any] = {
        "machine": describe_machine(),
        "flags": args.flags,
        "fit": asdict(fit_error),
        "steps_of_other_run": asdict(measure_error(cost, steps)),
        "loads": {},
    }
    print(f"step times: {document['fit']} on unseen steps, {document['steps_of_other_run']} on the other run")
    print("| load | figure | measured | simulated | error |\n|---|---|---|---|---|")
    for workload in workloads(args):
        load = workload.num_concurrent
        report = simulate(workload, plan_agents(workload, f"measurement/{load}"), config, cost)
        rows = {}
        for name in FIGURES:
            live, virtual = getattr(measured[load], name), getattr(report, name)
            error = (virtual - live) / live if live and virtual is not None else None
            rows[name] = {"measured": live, "simulated": virtual, "error": error}
            shown = "-" if error is None else f"{error:+.1%}"
            print(f"| {load} | {name} | {live} | {virtual} | {shown} |")
        document["loads"][load] = rows
    args.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
