"""Pelton and its peers side by side: one server in memory at a time, in turn, the five workloads over and over.

    python benchmarks/peers.py --serve ../shared/peers/serve.sh --peers llama-q4_0,openvino-int8,vllm-int8 \\
        --pelton pelton=MODEL --pelton "pelton-q4_0=FILE --threads 2" --workloads W1,W3 --rounds 5 --output result.json
    python benchmarks/peers.py --output result.json --table            # the table of what is there

A round starts every server once (llama.cpp twice: with 64 slots for W3, with 16 for the rest), another one first each
time, and runs the workloads on it, after the warm-up of `pelton bench`. All servers of a round get the same prompts,
made with the tokenizer of the first Pelton model, and other ones than in any other round. Every run is written to
`--output` as soon as it is done, and what is there is not run again: to go on after an interruption, repeat the
command. A server that does not start is noted with its last words and tried again in the next round.

`--serve` is a script `serve.sh NAME PORT` that runs one peer in the foreground. Beside what `pelton bench` reports:
seconds from the start of the process to the first token, peak resident memory (summed over the server's processes),
and `foreign_cpu`: cores that neither the server nor this client used. Where that is not near 0, measure again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from processes import ServerProcess, StartError, busy_cpu_s, free_port, own_cpu_s

from pelton.bench.client import ServerClient
from pelton.bench.errors import BenchError
from pelton.bench.report import RunReport, median_report
from pelton.bench.run import run_workload
from pelton.bench.workloads import WARM_UP, PromptMaker, Workload, corpus_digest, select_workloads

# llama.cpp shares out its context to a fixed number of slots: for 64 at once they must be many and short.
MANY_SLOTS = {"NP": "64"}
START_TIMEOUT_S = 600.0
WORKLOAD_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Engine:
    name: str
    command: tuple[str, ...]  # {port} is filled in
    is_pelton: bool

    def environment(self, workload: Workload) -> dict[str, str]:
        return MANY_SLOTS if self.name.startswith("llama") and workload.num_clients > 16 else {}


@dataclass
class Results:
    """What `--output` holds. `runs` are told apart by engine, workload and round."""

    path: Path
    runs: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    header: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Results:
        if not path.exists():
            return cls(path)
        document = json.loads(path.read_text(encoding="utf-8"))
        return cls(path, **document)

    def save(self) -> None:
        document = {name: getattr(self, name) for name in ("header", "starts", "failures", "runs")}
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path)

    def has(self, engine: str, workload: str, number: int) -> bool:
        return any((r["engine"], r["workload"], r["round"]) == (engine, workload, number) for r in self.runs)

    def reports(self, engine: str, workload: str) -> dict[int, RunReport]:
        """By round."""
        found = [r for r in self.runs if (r["engine"], r["workload"]) == (engine, workload)]
        return {r["round"]: RunReport(**r["report"]) for r in found}


class LocalTokenizer:
    """Implements `PromptTokenizer`: the same prompts for servers that offer no tokenizer of their own."""

    def __init__(self, model: str) -> None:
        from pelton.weights.catalog import resolve_model
        from pelton.weights.config import ModelConfig
        from pelton.weights.tokenizer import load_tokenizer

        self._tokenizer = load_tokenizer(resolve_model(ModelConfig(model=model)))

    async def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    async def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids)


def parse_engines(args: argparse.Namespace) -> list[Engine]:
    engines = []
    for text in args.pelton:
        name, _, rest = text.partition("=")
        command = (sys.executable, "-m", "pelton.cli.main", "serve", *shlex.split(rest))
        engines.append(Engine(name, (*command, "--port", "{port}", "--log-level", "warning"), True))
    names = args.peers.split(",") if args.peers else []
    if names and args.serve is None:
        raise SystemExit("--peers needs --serve, the script that starts one")
    engines += [Engine(name, ("bash", str(args.serve.resolve()), name, "{port}"), False) for name in names]
    if len({engine.name for engine in engines}) < len(engines) or not engines:
        raise SystemExit("one engine or more is needed, each with a name of its own")
    return engines


async def run_round(
    engines: list[Engine], workloads: list[Workload], number: int, maker: PromptMaker, results: Results, seed: int
) -> None:
    start = number % len(engines)
    for engine in engines[start:] + engines[:start]:
        missing = [w for w in workloads if not results.has(engine.name, w.name, number)]
        for environment in ({}, MANY_SLOTS):
            together = [w for w in missing if engine.environment(w) == environment]
            if not together:
                continue
            try:
                await run_server(engine, together, number, maker, results, f"{seed}/{number}")
            except (StartError, BenchError, TimeoutError) as error:
                print(f"{engine.name}: {error}", file=sys.stderr, flush=True)
                results.failures.append({"engine": engine.name, "round": number, "error": str(error)[-2000:]})
                results.save()


async def run_server(
    engine: Engine, workloads: list[Workload], number: int, maker: PromptMaker, results: Results, seed: str
) -> None:
    """Start, warm up, run `workloads`, end."""
    port = free_port()
    base_url = f"http://127.0.0.1:{port}"
    command = [part.replace("{port}", str(port)) for part in engine.command]
    log = results.path.with_suffix(f".{engine.name}.log")
    with ServerProcess(command, engine.environment(workloads[0]), log) as server:
        async with ServerClient(base_url) as client:
            first_token_s = server.wait_first_token(base_url, START_TIMEOUT_S)
            results.failures = [f for f in results.failures if (f["engine"], f["round"]) != (engine.name, number)]
            results.starts.append({"engine": engine.name, "round": number, "first_token_s": round(first_token_s, 2)})
            await client.prepare()
            await run_workload(client, WARM_UP, await maker.make_prompts(WARM_UP, seed), lambda *_: None)
            for workload in workloads:
                prompts = await maker.make_prompts(workload, seed)
                run = await measure(client, server, workload, prompts)
                results.runs.append({"engine": engine.name, "workload": workload.name, "round": number, **run})
                results.save()
                report = run["report"]
                print(
                    f"{number + 1}: {workload.name} {engine.name}: {report['output_tokens_per_s']} out tok/s, TTFT "
                    f"{report['ttft_p50_ms']} ms, foreign CPU {run['foreign_cpu']}",
                    file=sys.stderr,
                    flush=True,
                )


async def measure(
    client: ServerClient, server: ServerProcess, workload: Workload, prompts: list[str]
) -> dict[str, Any]:
    start_s, busy_s, known_s = time.perf_counter(), busy_cpu_s(), server.cpu_s() + own_cpu_s()
    report = await asyncio.wait_for(run_workload(client, workload, prompts, lambda *_: None), WORKLOAD_TIMEOUT_S)
    elapsed_s = time.perf_counter() - start_s
    foreign_s = busy_cpu_s() - busy_s - (server.cpu_s() + own_cpu_s() - known_s)
    return {
        "report": asdict(report),
        "peak_rss_mb": server.peak_rss_mb(),
        "pss_mb": server.pss_mb(),
        "foreign_cpu": round(max(0.0, foreign_s) / elapsed_s, 2),
    }


def print_table(results: Results) -> None:
    """Markdown. The ratio is to the best engine that is not Pelton, round by round, of output tokens per second."""
    pelton = results.header["pelton"]
    for workload in dict.fromkeys(run["workload"] for run in results.runs):
        reports = {engine: results.reports(engine, workload) for engine in results.header["engines"]}
        medians = {engine: median_report(list(found.values())) for engine, found in reports.items() if found}
        peers = [engine for engine in medians if engine not in pelton]
        best = max(peers, key=lambda engine: medians[engine].output_tokens_per_s, default=None)
        fastest = min(peers, key=lambda engine: medians[engine].ttft_p50_ms or 0.0, default=None)
        print(f"\n**{workload}**\n")
        print(
            "| engine | rounds | out tok/s | TTFT p50 / p99 ms | TPOT p50 / p99 ms "
            "| peak RSS MB | foreign CPU | to the best peer |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for engine, median in medians.items():
            runs = [r for r in results.runs if (r["engine"], r["workload"]) == (engine, workload)]
            memory, foreign = (max(run[name] for run in runs) for name in ("peak_rss_mb", "foreign_cpu"))
            ratios = [
                _ratio(reports[engine], reports[other], figure) + f" {label} ({other})"
                for other, figure, label in ((best, "output_tokens_per_s", "tok/s"), (fastest, "ttft_p50_ms", "TTFT"))
                if other is not None and engine in pelton
            ]
            errors = f", {median.num_errors} errors" if median.num_errors else ""
            print(
                f"| {engine} | {len(runs)}{errors} | {median.output_tokens_per_s:.1f} "
                f"| {_ms(median.ttft_p50_ms)} / {_ms(median.ttft_p99_ms)} "
                f"| {_ms(median.tpot_p50_ms)} / {_ms(median.tpot_p99_ms)} | {memory:,.0f} | {foreign:.2f} "
                f"| {', '.join(ratios)} |"
            )
    print("\n| engine | start to first token, s |\n|---|---|")
    for engine in results.header["engines"]:
        times = [start["first_token_s"] for start in results.starts if start["engine"] == engine]
        if times:
            print(f"| {engine} | {statistics.median(times):.1f} |")
    for failure in results.failures:
        print(f"\n{failure['engine']}, round {failure['round'] + 1}: {failure['error'].splitlines()[-1]}")


def _ratio(mine: dict[int, RunReport], theirs: dict[int, RunReport], figure: str) -> str:
    pairs = [(getattr(mine[n], figure), getattr(theirs[n], figure)) for n in mine if n in theirs]
    quotients = [a / b for a, b in pairs if a is not None and b]
    return f"{statistics.median(quotients):.2f}x" if quotients else "-"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def make_header(args: argparse.Namespace, engines: list[Engine], before: dict[str, Any]) -> dict[str, Any]:
    """What a reader must know; engines of earlier calls stay in the table."""
    from pelton.cli.environment import describe_machine

    header = {"machine": describe_machine(), "corpus": corpus_digest(), "seed": args.seed}
    for name in ("corpus", "seed"):
        if before and before[name] != header[name]:
            raise SystemExit(
                f"{args.output} was made with {name} {before[name]}, not {header[name]}: its prompts differ"
            )
    names = [engine.name for engine in engines]
    pelton = [engine.name for engine in engines if engine.is_pelton]
    header["engines"] = list(dict.fromkeys([*before.get("engines", ()), *names]))
    header["pelton"] = list(dict.fromkeys([*before.get("pelton", ()), *pelton]))
    return header


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pelton", action="append", default=[], metavar='"NAME=MODEL [FLAGS of pelton serve]"')
    parser.add_argument("--peers", help="names that --serve knows, with commas")
    parser.add_argument("--serve", type=Path)
    parser.add_argument("--tokenizer", help="model whose tokenizer counts the prompts; default: the first --pelton's")
    parser.add_argument("--workloads", default="all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    args = parser.parse_args()
    results = Results.open(args.output)
    if not args.table:
        engines = parse_engines(args)
        tokenizer = args.tokenizer or (shlex.split(args.pelton[0].partition("=")[2])[0] if args.pelton else None)
        if tokenizer is None:
            raise SystemExit("without --pelton, --tokenizer must name the model")
        results.header = make_header(args, engines, results.header)
        maker = PromptMaker(LocalTokenizer(tokenizer))
        for number in range(args.rounds):
            asyncio.run(run_round(engines, select_workloads(args.workloads), number, maker, results, args.seed))
    print_table(results)


if __name__ == "__main__":
    main()
