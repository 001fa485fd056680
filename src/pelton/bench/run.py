"""Runs workloads against one server, or against several in turn."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial

from pelton.bench.client import ServerClient
from pelton.bench.errors import BenchError
from pelton.bench.record import RequestRecord
from pelton.bench.report import RunReport, make_report, median_report
from pelton.bench.tokenize import make_prompt_maker
from pelton.bench.workloads import WARM_UP, Workload
from pelton.core.errors import ConfigError

# Called after each request with a line that says what is running, requests done, requests in all.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    name: str
    base_url: str
    model: str | None = None
    api_key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchPlan:
    """`num_passes` runs of each workload; each draws other prompts, by `seed` and its number."""

    workloads: list[Workload]
    num_passes: int = 1
    seed: int = 0
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.num_passes < 1:
            raise ConfigError(f"the number of passes is {self.num_passes}; it must be at least 1")


@dataclass(slots=True, kw_only=True)
class BenchResult:
    """`passes[workload][server]` is that server's reports, one per pass."""

    models: dict[str, str]
    ignores_eos: dict[str, bool]
    exact_prompts: bool
    passes: dict[str, dict[str, list[RunReport]]] = field(default_factory=dict)

    def median(self, workload: str, server: str) -> RunReport:
        return median_report(self.passes[workload][server])

    @property
    def num_errors(self) -> int:
        return sum(r.num_errors for servers in self.passes.values() for reports in servers.values() for r in reports)


async def run_bench(
    servers: list[Server], plan: BenchPlan, progress: Progress, on_report: Callable[[str, RunReport], None]
) -> BenchResult:
    """Every workload on every server, servers alternating within a pass. Raises `BenchError`, `ConfigError`."""
    if len({server.base_url.rstrip("/") for server in servers}) < len(servers):
        raise ConfigError("two names for one server: its prefix cache would answer the second of them")
    async with AsyncExitStack() as stack:
        clients = {}
        for server in servers:
            progress(f"{server.name}: looking", 0, 1)
            client = ServerClient(server.base_url, model=server.model, api_key=server.api_key, timeout_s=plan.timeout_s)
            clients[server.name] = await stack.enter_async_context(client)
            await client.prepare()
        maker = await make_prompt_maker(list(clients.values()))
        result = BenchResult(
            models={name: client.model for name, client in clients.items()},
            ignores_eos={name: "ignore_eos" in client.options for name, client in clients.items()},
            exact_prompts=maker.is_exact,
            passes={workload.name: {name: [] for name in clients} for workload in plan.workloads},
        )
        prompts = await maker.make_prompts(WARM_UP, f"{plan.seed}/warm-up")
        for name, client in clients.items():
            await run_workload(client, WARM_UP, prompts, partial(progress, f"{name}: warm-up"))
        for workload in plan.workloads:
            for number in range(plan.num_passes):
                progress(f"{workload.name}: making prompts", 0, 1)
                prompts = await maker.make_prompts(workload, f"{plan.seed}/{number}")
                for name in _rotated(list(clients), number):
                    line = f"{workload.name} {name} {number + 1}/{plan.num_passes}"
                    report = await run_workload(clients[name], workload, prompts, partial(progress, line))
                    on_report(line, report)
                    result.passes[workload.name][name].append(report)
        return result


def _rotated(names: list[str], number: int) -> list[str]:
    """The first of a pass is another server each time: heat and neighbours favour nobody."""
    start = number % len(names)
    return names[start:] + names[:start]


async def run_workload(
    client: ServerClient, workload: Workload, prompts: list[str], on_done: Callable[[int, int], None]
) -> RunReport:
    """One run. Raises `BenchError` where not one request succeeded."""
    waiting = deque(prompts)
    records: list[RequestRecord] = []

    async def run_client() -> None:
        while waiting:
            records.append(await client.complete(waiting.popleft(), workload.num_output_tokens))
            on_done(len(records), len(prompts))

    on_done(0, len(prompts))
    start_s = time.perf_counter()
    await asyncio.gather(*(run_client() for _ in range(min(workload.num_clients, len(prompts)))))
    report = make_report(workload.name, records, time.perf_counter() - start_s)
    if report.num_errors == report.num_requests:
        raise BenchError(f"{client.base_url}: every request of {workload.name} failed; the first: {report.first_error}")
    return report
