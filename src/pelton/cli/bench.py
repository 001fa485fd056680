"""`pelton bench`: measure OpenAI-compatible servers under load. Kernels: `bench_kernels.py`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from pelton.cli.requirements import require_aiohttp
from pelton.cli.tables import format_figure, print_table, progress_bar
from pelton.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from pelton.bench.report import RunReport
    from pelton.bench.run import BenchPlan, BenchResult, Server

DEFAULT_BASE_URL = "http://127.0.0.1:8000"

app = App(name="bench", help="Measure servers under load, and kernels.")
app.command(
    "pelton.cli.bench_agents:agents",
    name="agents",
    help="Drive one server with agents: turns, tool pauses, forks, shared system prompts.",
)
app.command(
    "pelton.cli.bench_kernels:kernels",
    name="kernels",
    help="Measure every native kernel beside the machine's own ceilings.",
)
app.command(
    "pelton.cli.bench_kernels:step",
    name="step",
    help="Show where every millisecond of a model's step goes.",
)

WorkloadFlag = Annotated[str, Parameter(help="W1 to W5, several with commas, or all")]
ModelFlag = Annotated[str | None, Parameter(help="model name to ask for; default: the first that the server lists")]
KeyFlag = Annotated[str | None, Parameter(help="bearer token; default: PELTON_API_KEY")]
SeedFlag = Annotated[int, Parameter(help="seed of the prompts; prompts seen before would come from the prefix cache")]
JsonFlag = Annotated[bool, Parameter(name="--json", negative=(), help="print one JSON document instead of tables")]
TimeoutFlag = Annotated[float, Parameter(help="longest silence of the server before a request counts as failed")]


@app.command
def serve(
    *,
    base_url: Annotated[
        str | None, Parameter(help="the server; default: PELTON_BASE_URL or " + DEFAULT_BASE_URL)
    ] = None,
    workload: WorkloadFlag = "all",
    model: ModelFlag = None,
    api_key: KeyFlag = None,
    runs: Annotated[int, Parameter(help="runs of each workload; the table shows medians")] = 1,
    seed: SeedFlag = 0,
    timeout_s: TimeoutFlag = 600.0,
    as_json: JsonFlag = False,
) -> int:
    """Drive one server with the workloads and report rates and latencies."""
    plan = _make_plan(workload, runs, seed, timeout_s)
    from pelton.bench.run import Server

    base_url = base_url or os.environ.get("PELTON_BASE_URL") or DEFAULT_BASE_URL
    server = Server(name="server", base_url=base_url, model=model, api_key=api_key_or_environment(api_key))
    result = _run([server], plan)
    if as_json:
        _print_json(result, seed, {"server": base_url})
    else:
        _print_notes(result)
        print_table(_figures_table({name: [("", result.median(name, "server"))] for name in result.passes}))
    return _exit_code(result)


@app.command
def compare(
    *servers: Annotated[str, Parameter(name="SERVER", help="NAME=URL, two or more, all serving the same model")],
    workload: WorkloadFlag = "all",
    passes: Annotated[int, Parameter(help="times that every server runs a workload, in turn")] = 5,
    model: ModelFlag = None,
    api_key: KeyFlag = None,
    seed: SeedFlag = 0,
    timeout_s: TimeoutFlag = 600.0,
    as_json: JsonFlag = False,
) -> int:
    """Drive several servers in turn and report medians and ratios between each two."""
    plan = _make_plan(workload, passes, seed, timeout_s)
    from pelton.bench.run import Server

    urls = _parse_servers(servers)
    chosen = [
        Server(name=name, base_url=url, model=model, api_key=api_key_or_environment(api_key))
        for name, url in urls.items()
    ]
    result = _run(chosen, plan)
    if as_json:
        _print_json(result, seed, urls)
    else:
        _print_notes(result)
        rows = {name: [(server, result.median(name, server)) for server in urls] for name in result.passes}
        print_table(_figures_table(rows))
        print_table(_ratios_table(result))
    return _exit_code(result)


def _parse_servers(servers: tuple[str, ...]) -> dict[str, str]:
    urls: dict[str, str] = {}
    for server in servers:
        name, _, url = server.partition("=")
        if not name or not url.startswith(("http://", "https://")):
            raise ConfigError(f"{server!r} is not NAME=URL, such as pelton=http://127.0.0.1:8000")
        if name in urls:
            raise ConfigError(f"two servers are called {name!r}")
        urls[name] = url
    if len(urls) < 2:
        raise ConfigError("compare needs two servers or more, each as NAME=URL")
    return urls


def _make_plan(workload: str, num_passes: int, seed: int, timeout_s: float) -> BenchPlan:
    require_aiohttp()
    from pelton.bench.run import BenchPlan
    from pelton.bench.workloads import select_workloads

    return BenchPlan(workloads=select_workloads(workload), num_passes=num_passes, seed=seed, timeout_s=timeout_s)


def _run(servers: list[Server], plan: BenchPlan) -> BenchResult:
    from pelton.bench.run import run_bench

    with progress_bar() as (on_progress, say):

        def on_report(line: str, report: RunReport) -> None:
            say(f"{line}: {report.output_tokens_per_s} out tok/s, TTFT {format_figure(report.ttft_p50_ms)} ms")

        return asyncio.run(run_bench(servers, plan, on_progress, on_report))


def api_key_or_environment(given: str | None) -> str | None:
    return given or os.environ.get("PELTON_API_KEY") or None


def _exit_code(result: BenchResult) -> int:
    return 1 if result.num_errors else 0


def _print_notes(result: BenchResult) -> None:
    if not result.exact_prompts:
        print("Prompt lengths are approximate: no server offers /tokenize and /detokenize.", file=sys.stderr)
    for name, ignores_eos in result.ignores_eos.items():
        if not ignores_eos:
            print(f"{name} does not take ignore_eos: its answers may be shorter than asked for.", file=sys.stderr)
    for workload, servers in result.passes.items():
        for name in servers:
            report = result.median(workload, name)
            if report.num_errors:
                line = f"{workload} {name}: {report.num_errors} requests failed; the first: {report.first_error}"
                print(line, file=sys.stderr)


_COLUMNS = (
    ("out tok/s", "output_tokens_per_s"),
    ("total tok/s", "total_tokens_per_s"),
    ("req/s", "requests_per_s"),
    ("TTFT p50", "ttft_p50_ms"),
    ("p99 ms", "ttft_p99_ms"),
    ("TPOT p50", "tpot_p50_ms"),
    ("p99 ms", "tpot_p99_ms"),
    ("ITL p99", "itl_p99_ms"),
    ("prompt", "num_prompt_tokens"),
    ("cached", "num_cached_tokens"),
    ("errors", "num_errors"),
)


def _figures_table(rows: dict[str, list[tuple[str, RunReport]]]) -> Table:
    from rich.table import Table

    has_names = any(name for row in rows.values() for name, _ in row)
    table = Table(box=None, header_style="bold")
    for title in ("workload", *(["server"] if has_names else [])):
        table.add_column(title)
    for title, _ in _COLUMNS:
        table.add_column(title, justify="right")
    for workload, reports in rows.items():
        for name, report in reports:
            figures = [format_figure(getattr(report, attribute)) for _, attribute in _COLUMNS]
            table.add_row(workload, *([name] if has_names else []), *figures)
    return table


_RATIO_FIGURES = ("output_tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms")


def _ratios_table(result: BenchResult) -> Table:
    from rich.table import Table

    from pelton.bench.report import pairwise_ratios

    table = Table(box=None, header_style="bold", title="ratios: median over passes (lowest to highest)")
    for title in ("workload", "ratio", *_RATIO_FIGURES):
        table.add_column(title.replace("_", " "), justify="left" if title in ("workload", "ratio") else "right")
    for workload, reports in result.passes.items():
        rows: dict[str, dict[str, str]] = {}
        for ratio in pairwise_ratios(reports, _RATIO_FIGURES):
            text = f"{ratio.median:.2f} ({ratio.lowest:.2f} to {ratio.highest:.2f})"
            rows.setdefault(f"{ratio.name} / {ratio.other}", {})[ratio.figure] = text
        for pair, figures in rows.items():
            table.add_row(workload, pair, *(figures.get(figure, "-") for figure in _RATIO_FIGURES))
    return table


def _print_json(result: BenchResult, seed: int, urls: dict[str, str]) -> None:
    from pelton.bench.report import LATENCIES, RATES, pairwise_ratios
    from pelton.bench.workloads import WORKLOADS, corpus_digest
    from pelton.cli.environment import describe_machine

    document: dict[str, Any] = {
        "machine": describe_machine(),
        "seed": seed,
        "corpus": corpus_digest(),
        "exact_prompts": result.exact_prompts,
        "servers": {
            name: {"base_url": url, "model": result.models[name], "ignores_eos": result.ignores_eos[name]}
            for name, url in urls.items()
        },
        "workloads": {},
    }
    for workload, reports in result.passes.items():
        document["workloads"][workload] = {
            "definition": asdict(WORKLOADS[workload]),
            "median": {name: asdict(result.median(workload, name)) for name in reports},
            "passes": {name: [asdict(report) for report in passes] for name, passes in reports.items()},
            "ratios": [asdict(ratio) for ratio in pairwise_ratios(reports, (*RATES, *LATENCIES))],
        }
    print(json.dumps(document, indent=1))
