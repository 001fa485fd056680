"""What a step's scheduling costs with many requests: `schedule()` and `update()`, no model.

    python benchmarks/scheduler_cost.py [--running 1024] [--waiting 10000] [--steps 200] [--policy agent ...]

The production scheduler, policies and KV manager. Requests of 100 tenants and 2,000 programs share system
prompts. Three situations: `full`, all seats are taken and everybody decodes; `memory`, seats are free but no
waiting request finds KV blocks, so that each step tries some in vain; `churn`, every request ends after
32 tokens and others take their places, prompts of about 500 tokens in chunks. One line per policy and
situation: median and 99th percentile in milliseconds of processor time.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Iterator

from pelton.core.batch import StepResult
from pelton.core.model_spec import KVGroupSpec
from pelton.core.protocols import MonotonicClock
from pelton.core.request import Request
from pelton.core.sampling_params import SamplingParams
from pelton.engine.kv.block_pool import BlockPool
from pelton.engine.kv.manager import KVManager
from pelton.engine.policies import POLICIES, fair
from pelton.engine.policies.context import PolicyContext
from pelton.engine.scheduler import Scheduler

BLOCK_SIZE = 16
NUM_PROMPT_TOKENS = 500


def make_requests(num_requests: int, max_tokens: int, seed: int) -> Iterator[Request]:
    rng = random.Random(seed)
    sampling = SamplingParams(max_tokens=max_tokens)
    for index in range(num_requests):
        program = rng.randrange(2000)
        system = [program % 7] * 64
        yield Request(
            request_id=f"{seed}-{index}",
            prompt_token_ids=system + [rng.randrange(30_000) for _ in range(NUM_PROMPT_TOKENS - 64)],
            sampling=sampling,
            arrival_time_s=index * 1e-3,
            tenant_id=f"tenant-{program % 100}",
            session_id=f"program-{program}",
            program_id=f"program-{program}",
            max_num_tokens=NUM_PROMPT_TOKENS + max_tokens,
        )


def make_scheduler(policy: str, num_running: int, num_blocks: int, num_seats: int) -> Scheduler:
    kv = KVManager((KVGroupSpec((0,)),), BlockPool(num_blocks), BLOCK_SIZE)
    clock = MonotonicClock()
    context = PolicyContext(
        clock=clock,
        num_blocks=num_blocks,
        num_cached_tokens=lambda request: kv.match(request).num_tokens,
        num_blocks_needed=lambda request: kv.num_blocks_to_reach(request, request.num_tokens),
    )
    return Scheduler(
        POLICIES[policy](context), kv, clock, max_num_seqs=num_seats, max_num_batched_tokens=num_running + 2048
    )


def turn(scheduler: Scheduler) -> tuple[float, float]:
    """One step; seconds in `schedule()` and in `update()` with the ends of requests."""
    started_s = time.thread_time()
    batch = scheduler.schedule()
    scheduled_s = time.thread_time()
    if batch is None:
        raise SystemExit("nothing could be scheduled")
    result = StepResult(batch.step_id, tuple((7,) if scheduled.samples else () for scheduled in batch.requests))
    got_s = time.thread_time()
    for request, _ in scheduler.update(batch, result):
        if len(request.output_token_ids) >= request.sampling.max_tokens:
            scheduler.remove(request)
    scheduler.events.clear()
    return scheduled_s - started_s, time.thread_time() - got_s


def measure(policy: str, situation: str, arguments: argparse.Namespace) -> str:
    num_running, num_waiting = arguments.running, arguments.waiting
    max_tokens = 32 if situation == "churn" else 4000
    num_seats = 2 * num_running if situation == "memory" else num_running
    blocks_each = -(-(NUM_PROMPT_TOKENS + arguments.steps + 64) // BLOCK_SIZE) + 2
    scheduler = make_scheduler(policy, num_running, num_running * blocks_each * 2 + 64, num_seats)
    for request in make_requests(num_running, max_tokens, 1):
        scheduler.add(request)
    while len(scheduler.policy) or any(request.num_remaining_tokens > 1 for request in scheduler.running):
        turn(scheduler)
    if situation == "memory":
        pool = scheduler.kv.pool
        pool.try_allocate(pool.num_available - num_running * (arguments.steps // BLOCK_SIZE + 2))
    for request in make_requests(num_waiting, max_tokens, 2):
        scheduler.add(request)
    times = []
    for _ in range(arguments.steps):
        times.append(turn(scheduler))
        if situation == "churn":
            for request in make_requests(num_waiting - len(scheduler.policy), max_tokens, random.randrange(10, 10**9)):
                scheduler.add(request)
    columns = []
    for part in zip(*times, strict=True):
        ordered = sorted(1e3 * seconds for seconds in part)
        columns.append(f"{statistics.median(ordered):6.2f} {ordered[int(0.99 * len(ordered))]:6.2f}")
    return (
        f"{policy:<9} {situation:<7} {columns[0]}   {columns[1]}   {len(scheduler.running):6} {len(scheduler.policy):6}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=1024)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--policy", nargs="+", default=sorted(POLICIES), choices=sorted(POLICIES))
    parser.add_argument("--situation", nargs="+", default=["full", "memory", "churn"])
    arguments = parser.parse_args()
    gc.disable()
    fair.SHARED_STEP_TOKENS = 10**6  # else 100 tenants get 128 prompt tokens a step, and a thousand never run at once
    print("                    schedule() ms    update() ms")
    print("policy    case         p50    p99      p50    p99   running waiting")
    for policy in arguments.policy:
        for situation in arguments.situation:
            print(measure(policy, situation, arguments), flush=True)


if __name__ == "__main__":
    main()
