"""What benchmarks with agents share: servers in turn, one in memory at a time, results that outlive an interruption."""

from __future__ import annotations

import argparse
import asyncio
import re
import shlex
import signal
import sys
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import MANY_SLOTS, START_TIMEOUT_S, Engine, LocalTokenizer, Results, make_header, parse_engines
from processes import ServerProcess, StartError, busy_cpu_s, free_port, own_cpu_s

from pelton.bench.agent_http import HttpAgentTarget, make_texts
from pelton.bench.agent_run import AgentRecord, AgentRunner
from pelton.bench.agents import AgentPlan, all_pieces, all_turns
from pelton.bench.client import ServerClient
from pelton.bench.errors import BenchError
from pelton.bench.tokenize import make_prompt_maker
from pelton.bench.workloads import WARM_UP, PromptMaker


@dataclass(frozen=True)
class StartedServer:
    """A server that has answered its first request."""

    engine: Engine
    base_url: str
    client: ServerClient
    maker: PromptMaker

    async def run(self, plans: list[AgentPlan], num_concurrent: int) -> list[AgentRecord]:
        """All plans, with a line of progress. Pelton is told who is who; others do not ask."""
        texts = await make_texts(self.maker, list(all_pieces(plans)))
        num_turns = sum(1 for _ in all_turns(plans))
        is_terminal = sys.stderr.isatty()

        def on_turn(num_done: int) -> None:
            if is_terminal or num_done % max(1, num_turns // 5) == 0:
                end = "\r" if is_terminal else "\n"
                print(f"  {num_done} of {num_turns} turns", file=sys.stderr, end=end, flush=True)

        target = HttpAgentTarget(self.client, texts, send_identity=self.engine.is_pelton)
        return await AgentRunner(target, on_turn).run(plans, num_concurrent)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `peers.py`, and `--command` for a server that neither of them can start."""
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pelton", action="append", default=[], metavar='"NAME=MODEL [FLAGS of pelton serve]"')
    parser.add_argument("--peers", help="names that --serve knows, with commas")
    parser.add_argument("--serve", type=Path)
    parser.add_argument("--command", action="append", default=[], metavar='"NAME=shell command with {port}"')
    parser.add_argument("--tokenizer", help="model whose tokenizer counts the prompts; default: the first --pelton's")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a minute or two, to see that all works")
    parser.add_argument("--table", action="store_true", help="only table and plot of what is there")


def open_results(args: argparse.Namespace, header: dict[str, Any]) -> Results:
    results = Results.open(args.output)
    if not args.table:
        engines = _engines(args) if args.pelton or args.peers or args.command else []
        results.header = make_header(args, engines, results.header) | header
    return results


def _engines(args: argparse.Namespace) -> list[Engine]:
    engines = parse_engines(args) if args.pelton or args.peers else []
    for text in args.command:
        name, _, command = text.partition("=")
        engines.append(Engine(name, ("bash", "-c", f"exec {command}"), False))
    return engines


def each_server(args: argparse.Namespace, results: Results) -> Iterator[tuple[int, Engine]]:
    """(round, server) that has no run yet, another one first each round."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server that runs is ended too
    engines = _engines(args)
    if not engines:
        raise SystemExit("name a server: --pelton, --peers with --serve, or --command")
    for number in range(args.rounds):
        start = number % len(engines)
        for engine in engines[start:] + engines[:start]:
            if not any((run["engine"], run["round"]) == (engine.name, number) for run in results.runs):
                yield number, engine


async def run_on_server(
    engine: Engine,
    args: argparse.Namespace,
    results: Results,
    number: int,
    drive: Callable[[StartedServer], Awaitable[dict[str, Any]]],
    num_clients: int,
) -> dict[str, Any] | None:
    """Start the server, warm it up, let `drive` use it; None where it failed, which is noted."""
    port = free_port()
    base_url = f"http://127.0.0.1:{port}"
    command = [part.replace("{port}", str(port)) for part in engine.command]
    environment = MANY_SLOTS if engine.name.startswith("llama") and num_clients > 16 else {}
    say(f"{engine.name}: starting, round {number + 1}")
    try:
        with ServerProcess(command, environment, results.path.with_suffix(f".{engine.name}.log")) as server:
            async with ServerClient(base_url) as client:
                server.wait_first_token(base_url, START_TIMEOUT_S)
                await client.prepare()
                maker = await _maker(args, client)
                for prompt in await maker.make_prompts(WARM_UP, f"{args.seed}/{number}"):
                    await client.complete(prompt, WARM_UP.num_output_tokens)
                busy_s, known_s = busy_cpu_s(), server.cpu_s() + own_cpu_s()
                start_s = asyncio.get_running_loop().time()
                run = await drive(StartedServer(engine, base_url, client, maker))
                foreign_s = busy_cpu_s() - busy_s - (server.cpu_s() + own_cpu_s() - known_s)
                elapsed_s = asyncio.get_running_loop().time() - start_s
                run["foreign_cpu"] = round(max(0.0, foreign_s) / elapsed_s, 2)
                run["peak_rss_mb"] = server.peak_rss_mb()
                return run
    except (StartError, BenchError, TimeoutError) as error:
        say(f"{engine.name}: {error}")
        results.failures.append({"engine": engine.name, "round": number, "error": str(error)[-2000:]})
        results.save()
        return None


async def _maker(args: argparse.Namespace, client: ServerClient) -> PromptMaker:
    """All servers get the same texts, so one tokenizer counts for all."""
    model = args.tokenizer or (shlex.split(args.pelton[0].partition("=")[2])[0] if args.pelton else None)
    return PromptMaker(LocalTokenizer(model)) if model else await make_prompt_maker([client])


def read_counter(base_url: str, name: str) -> float | None:
    """The sum of a counter under /metrics; None where the server has none."""
    try:
        with urllib.request.urlopen(f"{base_url}/metrics", timeout=10) as response:
            text = response.read().decode(errors="replace")
    except OSError:
        return None
    values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, values)) if values else None
