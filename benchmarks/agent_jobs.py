"""Agents on Pelton and its peers: job completion time and tokens computed again, at several loads.

    python benchmarks/agent_jobs.py --output result.json --loads 2,8,36 --rounds 3 \\
        --pelton "agent=MODEL --num-kv-blocks 1025 --scheduling-policy agent --host-kv-cache-gb 2" \\
        --pelton "fcfs=MODEL --num-kv-blocks 1025 --scheduling-policy fcfs" \\
        --command "vllm=env ... vllm serve ... --port {port}" --command "llama=llama-server ... --port {port}"
    python benchmarks/agent_jobs.py --output result.json --table      # table and plot of what is there

One server in memory at a time, started anew for every round, another one first each time. At load N, N agents of the
workload run at any time until 2 N (6 at least) have ended; all servers get the same prompts. Pelton is told tenant,
session and program of each request. Give all the same room for KV: the pressure is what is measured. A run that is
in `--output` is not run again. The plot lies beside it, as `.svg`. `--short` runs a few small agents.

`recomputed` are prompt tokens that the server had been given before in the same transcript and did not find in its
cache: by the `cached_tokens` of its answers, else by the prefix cache counters under its /metrics.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from dataclasses import asdict, replace
from typing import Any

from agent_runs import StartedServer, add_server_arguments, each_server, open_results, read_counter, run_on_server, say
from peers import Engine, Results
from plot import Bars, Chart, Series, save_svg

from pelton.bench.agent_report import make_agent_report, ttft_by_turn_ms
from pelton.bench.agents import AgentWorkload, plan_agents, select_agent_workload

HITS = "vllm:prefix_cache_hits_total"
PREEMPTIONS = "vllm:num_preemptions_total"


def at_load(workload: AgentWorkload, load: int) -> AgentWorkload:
    return replace(workload, num_agents=max(6, 2 * load), num_concurrent=load)


async def run_loads(
    engine: Engine, workload: AgentWorkload, number: int, results: Results, args: argparse.Namespace
) -> None:
    loads = [int(load) for load in args.loads.split(",")]

    async def drive(server: StartedServer) -> dict[str, Any]:
        return {"loads": {str(load): await run_load(server, at_load(workload, load), number, args) for load in loads}}

    run = await run_on_server(engine, args, results, number, drive, max(loads))
    if run is not None:
        results.runs.append({"engine": engine.name, "round": number, **run})
        results.save()


async def run_load(
    server: StartedServer, workload: AgentWorkload, number: int, args: argparse.Namespace
) -> dict[str, Any]:
    load = workload.num_concurrent
    say(f"{server.engine.name}: {workload.num_agents} agents, {load} at a time")
    plans = plan_agents(workload, f"{args.seed}/{number}/{load}")
    before = {name: read_counter(server.base_url, name) for name in (HITS, PREEMPTIONS)}
    records = await server.run(plans, load)
    elapsed_s = max(record.ended_s for record in records)
    report = make_agent_report(workload.name, load, records, elapsed_s)
    grown = {name: _growth(server.base_url, name, start) for name, start in before.items()}
    if report.num_cached_tokens is None and (hits := grown[HITS]) is not None:
        recomputed = max(0, report.num_seen_tokens - round(hits))
        report = replace(report, num_cached_tokens=round(hits), num_recomputed_tokens=recomputed)
    say(f"{server.engine.name}: jobs take {report.completion_mean_s} s, recomputed {report.num_recomputed_tokens}")
    turns = [turn for record in records for turn in record.turns]
    return {
        "report": asdict(report),
        "recomputed_share": report.recomputed_share,
        "num_preemptions": grown[PREEMPTIONS],
        "ttft_by_turn_ms": ttft_by_turn_ms(turns),
        "completions_s": sorted(round(record.completion_s, 2) for record in records if record.error is None),
    }


def _growth(base_url: str, name: str, before: float | None) -> float | None:
    after = read_counter(base_url, name)
    return None if before is None or after is None else after - before


def median_of(results: Results, engine: str, load: str, figure: str) -> float | None:
    """Over the rounds."""
    runs = [run["loads"][load] for run in results.runs if run["engine"] == engine and load in run["loads"]]
    values = [run[figure] if figure in run else run["report"][figure] for run in runs]
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def print_table(results: Results) -> None:
    engines = list(dict.fromkeys(run["engine"] for run in results.runs))
    loads = list(dict.fromkeys(load for run in results.runs for load in run["loads"]))
    for load in loads:
        means = {engine: median_of(results, engine, load, "completion_mean_s") for engine in engines}
        print(f"\n**{load} agents at a time** (medians over rounds)\n")
        print(
            "| engine | rounds | job mean s | p95 s | TTFT p50 / p99 ms | prompt | recomputed | of computed | errors |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for engine in engines:
            figure = {
                name: median_of(results, engine, load, name)
                for name in (
                    "completion_p95_s",
                    "ttft_p50_ms",
                    "ttft_p99_ms",
                    "num_prompt_tokens",
                    "num_recomputed_tokens",
                    "recomputed_share",
                    "num_errors",
                )
            }
            rounds = sum(run["engine"] == engine for run in results.runs)
            share = figure["recomputed_share"]
            print(
                f"| {engine} | {rounds} | {_text(means[engine])} | {_text(figure['completion_p95_s'])} "
                f"| {_text(figure['ttft_p50_ms'])} / {_text(figure['ttft_p99_ms'])} "
                f"| {_text(figure['num_prompt_tokens'])} | {_text(figure['num_recomputed_tokens'])} "
                f"| {'-' if share is None else f'{share:.1%}'} | {_text(figure['num_errors'])} |"
            )
        _print_ratios(results, means)
    for failure in results.failures:
        print(f"\n{failure['engine']}, round {failure['round'] + 1}: {failure['error'].splitlines()[-1]}")


def _print_ratios(results: Results, means: dict[str, float | None]) -> None:
    first = results.header["pelton"][0] if results.header["pelton"] else None
    others = {engine: mean for engine, mean in means.items() if engine != first and mean}
    if first is not None and others and (own := means.get(first)):
        best = min(others, key=lambda engine: others[engine] or 0.0)
        print(f"\n{first} against the best of the others ({best}): {(others[best] or 0.0) / own:.2f}x faster jobs")


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2f}"


def save_plot(results: Results) -> None:
    engines = list(dict.fromkeys(run["engine"] for run in results.runs))
    loads = list(dict.fromkeys(load for run in results.runs for load in run["loads"]))
    if not engines:
        return

    def bars(title: str, label: str, figure: str) -> Bars:
        return Bars(
            title, label, loads, {name: [median_of(results, name, load, figure) for load in loads] for name in engines}
        )

    heaviest = {run["engine"]: run["loads"][loads[-1]] for run in results.runs if loads[-1] in run["loads"]}
    save_svg(
        results.path.with_suffix(".svg"),
        [
            bars("mean job completion time, by agents at a time", "s", "completion_mean_s"),
            bars("prompt tokens computed again", "tokens", "num_recomputed_tokens"),
            Chart(
                f"time to first token by turn, {loads[-1]} agents at a time",
                "turn",
                "ms",
                [Series(name, run["ttft_by_turn_ms"]) for name, run in heaviest.items()],
                log_y=True,
            ),
            Chart(
                f"jobs done within a time, {loads[-1]} agents at a time",
                "s",
                "share",
                [
                    Series(name, [(t, (n + 1) / len(run["completions_s"])) for n, t in enumerate(run["completions_s"])])
                    for name, run in heaviest.items()
                ],
            ),
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_arguments(parser)
    parser.add_argument("--workload", default="coding-small")
    parser.add_argument("--loads", default="2,8,36")
    args = parser.parse_args()
    if args.short:
        args.workload, args.loads = "smoke", "2,4"
    workload = select_agent_workload(args.workload)
    results = open_results(args, {"workload": asdict(workload)})
    if not args.table:
        for number, engine in each_server(args, results):
            asyncio.run(run_loads(engine, workload, number, results, args))
    print_table(results)
    save_plot(results)


if __name__ == "__main__":
    main()
