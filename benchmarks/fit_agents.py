"""What the traces say of turns: the shapes behind `pelton.bench.agents`.

    python benchmarks/fit_agents.py mooncake_conversation_trace.jsonl mooncake_synthetic_trace.jsonl \\
        --azure azure_llm_2023_code.csv

A request of a Mooncake trace whose prompt goes on from an earlier one's is a follow-up turn (`simulate/trace.py`); its
new tokens are those beyond the earlier prompt. Prints quantiles and the lognormal through p50 and p90.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path

from pelton.bench.report import percentile
from pelton.simulate.trace import TRACE_BLOCK_TOKENS, read_trace

PERCENTS = (10, 25, 50, 75, 90, 95, 99)
Z_90 = 1.2816


def row(name: str, values: Sequence[float]) -> str:
    quantiles = [percentile(values, percent) or 0.0 for percent in PERCENTS]
    median, p90 = quantiles[2], quantiles[4]
    sigma = f"{math.log(p90 / median) / Z_90:.2f}" if 0 < median < p90 else "-"
    return f"| {name} | {len(values)} | " + " | ".join(f"{value:,.2f}" for value in quantiles) + f" | {sigma} |"


def describe(path: Path) -> list[str]:
    requests = read_trace(path)
    first, new, outputs, gaps, seen_share = [], [], [], [], []
    last: dict[int, tuple[float, int]] = {}
    known: set[int] = set()
    turns: dict[int, int] = {}
    for request in requests:
        turns[request.session] = turns.get(request.session, 0) + 1
        num_seen = next((i for i, h in enumerate(request.hash_ids) if h not in known), len(request.hash_ids))
        seen = min(num_seen * TRACE_BLOCK_TOKENS, request.num_prompt_tokens)
        known.update(request.hash_ids)
        if request.session in last:
            before_s, before_tokens = last[request.session]
            gaps.append(request.arrival_s - before_s)
            new.append(max(1, request.num_prompt_tokens - before_tokens))
            outputs.append(request.num_output_tokens)
            seen_share.append(seen / request.num_prompt_tokens)
        else:
            first.append(request.num_prompt_tokens)
        last[request.session] = (request.arrival_s, request.num_prompt_tokens)
    return [
        row("turns of a session", list(turns.values())),
        row("prompt of the first turn", first),
        row("new tokens of a later turn", new),
        row("output of a later turn", outputs),
        row("seen before, of a later turn", seen_share),
        row("time since the turn before, s", gaps),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--azure", type=Path)
    args = parser.parse_args()
    heading = "| what | n | " + " | ".join(f"p{percent}" for percent in PERCENTS) + " | sigma |"
    for path in args.traces:
        print(f"\n{path.name}\n\n{heading}\n|" + "---|" * (len(PERCENTS) + 3))
        print("\n".join(describe(path)))
    if args.azure is not None:
        with args.azure.open(newline="") as file:
            rows = list(csv.DictReader(file))
        print(f"\n{args.azure.name}\n\n{heading}\n|" + "---|" * (len(PERCENTS) + 3))
        print(row("prompt", [float(line["ContextTokens"]) for line in rows]))
        print(row("output", [float(line["GeneratedTokens"]) for line in rows]))


if __name__ == "__main__":
    main()
