"""A tenant that chats beside one that floods: what its time to first token and its gaps between tokens become.

    python benchmarks/noisy_neighbour.py --output result.json --pelton "fcfs=MODEL --scheduling-policy fcfs" \\
        --pelton "agent=MODEL --scheduling-policy agent" --peers vllm-int8,llama-q8_0 --serve ../shared/peers/serve.sh
    python benchmarks/noisy_neighbour.py --output result.json --simulate cpu.json --policies fcfs,fair,agent
    python benchmarks/noisy_neighbour.py --output result.json --table      # table and plot of what is there

Tenant B runs two chats: messages of 48 tokens, answers of 32, half a second of thought. First alone; then, on the
same server, tenant A sends 64 prompts of 2,000 tokens at once, 5 s after B began, for answers of 16 tokens. B's
figures of the second run are of turns sent while a request of A was in the server; `worst gap`, B's longest wait
between two tokens of an answer, of those that were running then, too. `--short` is a tenth of it. The plot lies
beside `--output`, as `.svg`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import dataclass, replace
from typing import Any

from agent_runs import StartedServer, add_server_arguments, each_server, open_results, run_on_server, say
from peers import Engine, Results
from plot import Bars, Chart, Series, save_svg

from pelton.bench.agent_run import AgentRecord
from pelton.bench.agents import AgentPlan, Piece, Turn
from pelton.bench.report import percentile

NOISY, QUIET = "A", "B"


@dataclass(frozen=True)
class Scenario:
    num_flood: int = 64
    num_flood_tokens: int = 2000
    num_flood_output: int = 16
    flood_s: float = 5.0
    num_chats: int = 2
    num_turns: int = 40
    num_message_tokens: int = 48
    num_answer_tokens: int = 32
    think_s: float = 0.5

    def chats(self, seed: str) -> list[AgentPlan]:
        return [self._chat(f"{seed}/chat-{number}") for number in range(self.num_chats)]

    def _chat(self, name: str) -> AgentPlan:
        turns = tuple(
            Turn(
                Piece(f"{name}/{number}/new", self.num_message_tokens),
                Piece(f"{name}/{number}/answer", self.num_answer_tokens),
                self.think_s,
                "user",
            )
            for number in range(self.num_turns)
        )
        return AgentPlan(name, name, QUIET, Piece(f"{name}/system", self.num_message_tokens), 0.0, turns)

    def flood(self, seed: str) -> list[AgentPlan]:
        return [self._flood(f"{seed}/flood-{number}") for number in range(self.num_flood)]

    def _flood(self, name: str) -> AgentPlan:
        turn = Turn(
            Piece(f"{name}/new", self.num_flood_tokens - 1), Piece(f"{name}/answer", self.num_flood_output), 0, ""
        )
        return AgentPlan(name, name, NOISY, Piece(f"{name}/system", 1), self.flood_s, (turn,))


SHORT = Scenario(num_flood=8, num_flood_tokens=1000, num_chats=1, num_turns=8, flood_s=2.0)


def figures(records: list[AgentRecord], *, under_flood: bool) -> dict[str, Any]:
    """What `--output` keeps of a run."""
    flood = [turn for record in records if record.plan.tenant_id == NOISY for turn in record.turns]
    span = (
        min((turn.started_s for turn in flood), default=0.0),
        max((turn.started_s + turn.record.elapsed_s for turn in flood), default=0.0),
    )
    chat = [turn for record in records if record.plan.tenant_id == QUIET for turn in record.turns]
    counted = [turn for turn in chat if span[0] <= turn.started_s <= span[1]] if under_flood else chat
    done = [turn for turn in counted if turn.record.error is None]
    ttfts = [turn.record.ttft_s for turn in done]
    overlapping = [
        turn
        for turn in chat
        if not under_flood or (turn.started_s <= span[1] and turn.started_s + turn.record.elapsed_s >= span[0])
    ]
    gaps = [gap for turn in overlapping for gap in turn.record.gaps_s]
    return {
        "flood_span_s": span,
        "num_turns": len(done),
        "num_errors": len(counted) - len(done) + sum(turn.record.error is not None for turn in flood),
        "first_error": next((turn.record.error for turn in flood + counted if turn.record.error), None),
        "ttft_p50_s": percentile(ttfts, 50),
        "ttft_p99_s": percentile(ttfts, 99),
        "worst_gap_s": max(gaps, default=None),
        "flood_ttft_p50_s": percentile([turn.record.ttft_s for turn in flood if turn.record.error is None], 50),
        "turns": [
            (round(turn.started_s, 3), round(turn.record.ttft_s, 4), round(max(turn.record.gaps_s, default=0.0), 4))
            for turn in sorted(chat, key=lambda turn: turn.started_s)
        ],
    }


async def run_real(engine: Engine, scenario: Scenario, number: int, results: Results, args: argparse.Namespace) -> None:
    async def drive(server: StartedServer) -> dict[str, Any]:
        seed = f"{args.seed}/{number}"
        say(f"{engine.name}: B alone")
        alone = await server.run(scenario.chats(f"{seed}/alone"), 999)
        say(f"{engine.name}: B beside A")
        beside = await server.run(scenario.flood(seed) + scenario.chats(f"{seed}/beside"), 999)
        return {"alone": figures(alone, under_flood=False), "beside": figures(beside, under_flood=True)}

    run = await run_on_server(engine, args, results, number, drive, scenario.num_flood + scenario.num_chats)
    if run is not None:
        results.runs.append({"engine": engine.name, "round": number, **run})
        results.save()


def run_simulated(policy: str, scenario: Scenario, args: argparse.Namespace) -> dict[str, Any]:
    from pelton.build import build_simulated_server
    from pelton.engine.config import EngineConfig
    from pelton.simulate.agents import run_agents
    from pelton.simulate.clock import VirtualClock, run_virtual
    from pelton.simulate.cost import load_cost

    config = EngineConfig(scheduling_policy=policy, max_num_batched_tokens=args.max_num_batched_tokens)

    async def run(plans: list[AgentPlan]) -> list[AgentRecord]:
        return await run_agents(build_simulated_server(config, load_cost(args.simulate)), plans, 999)

    alone = run_virtual(run(scenario.chats("alone")), VirtualClock())
    beside = run_virtual(run(scenario.flood("x") + scenario.chats("beside")), VirtualClock())
    return {"alone": figures(alone, under_flood=False), "beside": figures(beside, under_flood=True)}


def print_table(results: Results) -> None:
    print("| engine | round | B's TTFT p99 alone, s | beside A, s | ratio | worst gap alone, s | beside A, s | turns |")
    print("|---|---|---|---|---|---|---|---|")
    for run in results.runs:
        alone, beside = run["alone"], run["beside"]
        ratio = beside["ttft_p99_s"] / alone["ttft_p99_s"] if beside["ttft_p99_s"] and alone["ttft_p99_s"] else None
        cells = (alone["ttft_p99_s"], beside["ttft_p99_s"], ratio, alone["worst_gap_s"], beside["worst_gap_s"])
        texts = " | ".join("-" if cell is None else f"{cell:.3f}" for cell in cells)
        errors = f", {beside['num_errors']} errors: {beside['first_error']}" if beside["num_errors"] else ""
        print(f"| {run['engine']} | {run['round'] + 1} | {texts} | {beside['num_turns']}{errors} |")


def save_plot(results: Results) -> None:
    first = {run["engine"]: run for run in reversed(results.runs)}
    runs = [first[name] for name in sorted(first, key=list(first).index, reverse=True)]
    if not runs:
        return
    spans = [(*run["beside"]["flood_span_s"], "") for run in runs[:1]]

    def lines(column: int) -> list[Series]:
        return [Series(run["engine"], [(t[0], t[column]) for t in run["beside"]["turns"]]) for run in runs]

    groups = [run["engine"] for run in runs]
    save_svg(
        results.path.with_suffix(".svg"),
        [
            Chart("B's time to first token beside A", "s since B began", "s", lines(1), True, spans),
            Chart("B's longest gap within an answer", "s since B began", "s", lines(2), True, spans),
            Bars(
                "B's TTFT p99",
                "s",
                groups,
                {
                    "alone": [run["alone"]["ttft_p99_s"] for run in runs],
                    "beside A": [run["beside"]["ttft_p99_s"] for run in runs],
                },
                True,
            ),
            Bars("median TTFT of A's prompts", "s", groups, {"A": [run["beside"]["flood_ttft_p50_s"] for run in runs]}),
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_arguments(parser)
    parser.add_argument("--simulate", metavar="COST", help="on virtual time, with this cost, instead of servers")
    parser.add_argument("--policies", default="fcfs", help="to simulate")
    parser.add_argument("--max-num-batched-tokens", type=int, default=512, help="to simulate")
    args = parser.parse_args()
    scenario = SHORT if args.short else Scenario()
    results = open_results(args, {"scenario": vars(scenario)})
    if args.simulate and not args.table:
        results.runs = [
            {"engine": policy, "round": 0, **run_simulated(policy, replace(scenario), args)}
            for policy in args.policies.split(",")
        ]
        results.save()
    elif not args.table:
        for number, engine in each_server(args, results):
            asyncio.run(run_real(engine, scenario, number, results, args))
    print_table(results)
    save_plot(results)


if __name__ == "__main__":
    sys.exit(main())
