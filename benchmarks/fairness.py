"""Fairness between tenants on virtual time: service in time, weighted shares, a burst after idling, per policy.

    python benchmarks/fairness.py --policies fcfs,fair,agent --output fairness.svg [--cost h100-8b] [--short]

The studies of VTC (Sheng et al., OSDI 2024) through the production scheduler, millions of tokens in seconds:

- overload: one tenant sends 12 requests a second, one 24, of 256 tokens in and out: each more than half of what the
  machine does, as in their section 5.2; the gap is the greatest difference of service from then on;
- weights: four tenants that always wait, weights 1 to 4; shares of service, and the gap of service by weight;
- burst: one tenant sends 16 requests a second, one nothing for a minute and then thousands at once.

Service is counted by `ServiceLog` from the steps: 1 for a prompt token computed, 2 for an output token. Prompts of a
study share nothing, so the prefix cache is empty.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from plot import Bars, Chart, Series, save_svg

from pelton.build import build_simulated_server
from pelton.core.request import Submission
from pelton.core.sampling_params import SamplingParams
from pelton.engine.config import EngineConfig
from pelton.simulate.clock import VirtualClock, run_virtual
from pelton.simulate.cost import StepCost, load_cost
from pelton.simulate.service import ServiceLog

SAMPLE_S = 1.0


@dataclass(frozen=True)
class Arrival:
    time_s: float
    tenant_id: str
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True)
class Study:
    """`compared_s` is when the tenants named in `compared` are all backlogged."""

    name: str
    arrivals: Sequence[Arrival]
    compared: tuple[str, ...]
    compared_s: tuple[float, float]
    tenants: tuple[str, ...] = ()  # settings, as of --tenant


def overload(duration_s: float, rng: random.Random) -> Study:
    def stream(tenant_id: str, per_s: float) -> list[Arrival]:
        times, now_s = [], 0.0
        while (now_s := now_s + rng.expovariate(per_s)) < duration_s:
            times.append(Arrival(now_s, tenant_id, 256, 256))
        return times

    return Study("overload", stream("12/s", 12) + stream("24/s", 24), ("12/s", "24/s"), (20.0, duration_s))


def weights(duration_s: float, rng: random.Random) -> Study:
    names = [f"weight {weight}" for weight in (1, 2, 3, 4)]
    count = round(duration_s * 14)
    arrivals = [
        Arrival(0.0, name, rng.randrange(64, 512), rng.randrange(32, 256)) for name in names for _ in range(count)
    ]
    settings = tuple(f"{name}:weight={name.split()[1]}" for name in names)
    return Study("weights", arrivals, tuple(names), (20.0, duration_s), settings)


def burst(duration_s: float, rng: random.Random) -> Study:
    steady = [Arrival(n / 16, "steady", 256, 256) for n in range(round(duration_s * 16))]
    late = [Arrival(60.0, "bursting", rng.randrange(128, 384), 256) for _ in range(round(duration_s * 16))]
    return Study("burst", steady + late, ("steady", "bursting"), (61.0, duration_s))


STUDIES: tuple[Callable[[float, random.Random], Study], ...] = (overload, weights, burst)


@dataclass(frozen=True)
class Outcome:
    study: str
    policy: str
    series: dict[str, list[tuple[float, float]]]  # service in time
    shares: dict[str, float]  # while compared
    gap: float  # greatest difference of weighted service, from the start of the comparison on
    total_service: int
    wall_s: float


def run_study(study: Study, policy: str, cost: StepCost, duration_s: float) -> Outcome:
    config = EngineConfig(
        scheduling_policy=policy,
        tenants=study.tenants,
        max_num_seqs=64,
        max_num_batched_tokens=1024,
        num_kv_blocks=1025,
        max_num_waiting=1_000_000,
    )
    clock, started_s = VirtualClock(), time.perf_counter()

    async def run() -> ServiceLog:
        server = build_simulated_server(config, cost)
        log = ServiceLog(server.engine.scheduler.requests)
        server.executor.listeners.append(log)
        for number, arrival in enumerate(sorted(study.arrivals, key=lambda arrival: arrival.time_s)):
            await asyncio.sleep(max(0.0, arrival.time_s - clock.now_s()))
            server.submit(_submission(number, arrival), keep_times=False)
        await asyncio.sleep(max(0.0, duration_s - clock.now_s()))
        return log

    log = run_virtual(run(), clock)
    start_s, end_s = study.compared_s
    weight = {name: float(name.split()[1]) if name.startswith("weight") else 1.0 for name in study.compared}
    base = {name: log.total(name, start_s) for name in study.compared}
    times = [start_s + SAMPLE_S * n for n in range(int((end_s - start_s) / SAMPLE_S) + 1)]
    grown = {name: [(log.total(name, t) - base[name]) / weight[name] for t in times] for name in study.compared}
    total = sum(grown[name][-1] * weight[name] for name in study.compared) or 1.0
    return Outcome(
        study.name,
        policy,
        {name: [(t, log.total(name, t)) for t in range(0, int(duration_s) + 1, 2)] for name in study.compared},
        {name: round(grown[name][-1] * weight[name] / total, 4) for name in study.compared},
        max(max(values) - min(values) for values in zip(*grown.values(), strict=True)),
        round(sum(log.total(name, duration_s) for name in log.tenant_ids)),
        round(time.perf_counter() - started_s, 2),
    )


def _submission(number: int, arrival: Arrival) -> Submission:
    return Submission(
        request_id=f"r{number}",
        prompt_token_ids=[number + 1] * arrival.num_prompt_tokens,
        sampling=SamplingParams(temperature=0.0, max_tokens=arrival.num_output_tokens, ignore_eos=True),
        tenant_id=arrival.tenant_id,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default="fcfs,fair")
    parser.add_argument("--cost", default="h100-8b")
    parser.add_argument("--output", type=Path, required=True, help="the plot; figures lie beside it, as .json")
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    duration_s = 90.0 if args.short else 300.0
    cost = load_cost(args.cost)
    outcomes = []
    print("| study | policy | shares | greatest gap of service | service | wall s |\n|---|---|---|---|---|---|")
    for make in STUDIES:
        for policy in args.policies.split(","):
            study = make(duration_s, random.Random(make.__name__))
            outcome = run_study(study, policy, cost, duration_s)
            outcomes.append(outcome)
            shares = ", ".join(f"{name} {share:.1%}" for name, share in outcome.shares.items())
            print(
                f"| {outcome.study} | {policy} | {shares} | {outcome.gap:,.0f} | {outcome.total_service:,} "
                f"| {outcome.wall_s} |",
                flush=True,
            )
    charts: list[Chart | Bars] = [
        Chart(
            f"{outcome.study}, {outcome.policy}",
            "s",
            "service",
            [Series(name, points) for name, points in outcome.series.items()],
        )
        for outcome in outcomes
    ]
    save_svg(args.output, charts, columns=len(args.policies.split(",")))
    document = [{name: value for name, value in vars(outcome).items() if name != "series"} for outcome in outcomes]
    args.output.with_suffix(".json").write_text(json.dumps({"cost": args.cost, "studies": document}, indent=1) + "\n")


if __name__ == "__main__":
    main()
