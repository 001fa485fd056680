"""`pelton bench agents`: agents with tool pauses and forks against an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from pelton.cli.bench import (
    DEFAULT_BASE_URL,
    JsonFlag,
    KeyFlag,
    ModelFlag,
    SeedFlag,
    TimeoutFlag,
    api_key_or_environment,
)
from pelton.cli.requirements import require_aiohttp
from pelton.cli.tables import format_figure, print_table, progress_bar
from pelton.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from pelton.bench.agent_bench import AgentBenchPlan
    from pelton.bench.agent_report import AgentReport
    from pelton.bench.run import Server

AgentsFlag = Annotated[int | None, Parameter(help="agents in all; default: the workload's")]
WorkloadFlag = Annotated[str, Parameter(help="coding, coding-small or smoke")]

AGENT_COLUMNS = (
    ("agents", "num_agents"),
    ("at a time", "num_concurrent"),
    ("turns", "num_turns"),
    ("job mean s", "completion_mean_s"),
    ("p50 s", "completion_p50_s"),
    ("p95 s", "completion_p95_s"),
    ("TTFT p50", "ttft_p50_ms"),
    ("p99 ms", "ttft_p99_ms"),
    ("TPOT p50", "tpot_p50_ms"),
    ("prompt", "num_prompt_tokens"),
    ("seen", "num_seen_tokens"),
    ("cached", "num_cached_tokens"),
    ("recomputed", "num_recomputed_tokens"),
    ("errors", "num_errors"),
)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServerFlags:
    """Which server, and how it is asked."""

    base_url: Annotated[str | None, Parameter(help="the server; default: PELTON_BASE_URL or " + DEFAULT_BASE_URL)] = (
        None
    )
    model: ModelFlag = None
    api_key: KeyFlag = None
    timeout_s: TimeoutFlag = 600.0
    send_identity: Annotated[
        bool,
        Parameter(
            negative=(), help="send X-Tenant-Id, X-Session-Id, X-Program-Id and prompt_cache_key with every request"
        ),
    ] = False


def agents(
    *,
    target: ServerFlags = ServerFlags(),
    workload: WorkloadFlag = "coding-small",
    num_agents: AgentsFlag = None,
    loads: Annotated[str | None, Parameter(help="agents at a time, such as 2,8,24; default: the workload's")] = None,
    runs: Annotated[int, Parameter(help="runs of each load")] = 1,
    seed: SeedFlag = 0,
    as_json: JsonFlag = False,
) -> int:
    """Drive one server with agents and report job completion times and tokens computed again."""
    require_aiohttp()
    from pelton.bench.agent_bench import AgentBenchPlan
    from pelton.bench.agents import select_agent_workload
    from pelton.bench.run import Server

    url = target.base_url or os.environ.get("PELTON_BASE_URL") or DEFAULT_BASE_URL
    chosen = select_agent_workload(workload, agents=num_agents)
    plan = AgentBenchPlan(
        workload=chosen,
        loads=parse_loads(loads) or (chosen.num_concurrent,),
        num_passes=runs,
        seed=seed,
        send_identity=target.send_identity,
        timeout_s=target.timeout_s,
    )
    server = Server(name="server", base_url=url, model=target.model, api_key=api_key_or_environment(target.api_key))
    reports = _run(server, plan)
    if as_json:
        print_agent_json(reports, {"workload": asdict(chosen), "seed": seed, "base_url": url})
    else:
        print_table(agent_table([("", report) for report in reports]))
    for report in reports:
        if report.first_error:
            print(f"{report.num_errors} agents gave up; the first: {report.first_error}", file=sys.stderr)
    return 1 if any(report.num_errors for report in reports) else 0


def parse_loads(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ConfigError(f"loads: {text!r} is not a list of whole numbers, such as 2,8,24") from None


def _run(server: Server, plan: AgentBenchPlan) -> list[AgentReport]:
    from pelton.bench.agent_bench import run_agent_bench

    with progress_bar() as (on_progress, say):

        def on_report(report: AgentReport) -> None:
            mean = format_figure(report.completion_mean_s)
            say(f"{report.num_concurrent} at a time: jobs take {mean} s, TTFT {format_figure(report.ttft_p50_ms)} ms")

        return asyncio.run(run_agent_bench(server, plan, on_progress, on_report))


def agent_table(rows: Sequence[tuple[str, AgentReport]]) -> Table:
    """A row for every (name, report); the name is what differs between them."""
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    names = any(name for name, _ in rows)
    for title in ("workload", *(["policy"] if names else [])):
        table.add_column(title)
    for title, _ in AGENT_COLUMNS:
        table.add_column(title, justify="right")
    for name, report in rows:
        figures = [format_figure(getattr(report, attribute)) for _, attribute in AGENT_COLUMNS]
        table.add_row(report.workload, *([name] if names else []), *figures)
    return table


def print_agent_json(reports: Sequence[AgentReport], header: dict[str, Any]) -> None:
    from pelton.cli.environment import describe_machine

    document = {"machine": describe_machine(), **header, "reports": [asdict(report) for report in reports]}
    print(json.dumps(document, indent=1, default=str))
