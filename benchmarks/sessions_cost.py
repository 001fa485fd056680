"""What sessions, pins and bounds cost the engine's thread, beside the scheduler; no model.

    python benchmarks/sessions_cost.py [--running 1024] [--waiting 10000] [--pins 1000] [--policy agent]

Memory is full of running requests and of pins (100 blocks each), so that every step looks for pins that have to
yield to the head of the queue and finds none: the dearest case. One line per part, in milliseconds of
processor time: median and 99th percentile.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable

from pelton.core.batch import StepResult
from pelton.core.events import EngineInfo
from pelton.core.model_spec import KVGroupSpec
from pelton.core.protocols import MonotonicClock
from pelton.core.request import FinishReason, Submission
from pelton.core.sampling_params import SamplingParams
from pelton.core.tenant import parse_tenants
from pelton.engine.admission import make_requests
from pelton.engine.kv.block_pool import BlockPool
from pelton.engine.kv.costs import KVCosts
from pelton.engine.kv.manager import KVManager
from pelton.engine.kv.pins import Pin
from pelton.engine.policies import POLICIES
from pelton.engine.policies.context import PolicyContext
from pelton.engine.scheduler import Scheduler
from pelton.engine.tenancy import Tenancy

BLOCK_SIZE = 16
NUM_PROMPT_TOKENS = 500
PIN_BLOCKS = 100
LONG_PROMPT_TOKENS = 128_000


class Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.rng = random.Random(1)
        self.clock = MonotonicClock()
        blocks_each = -(-NUM_PROMPT_TOKENS // BLOCK_SIZE) + 14
        num_blocks = arguments.running * blocks_each + arguments.pins * PIN_BLOCKS + 10_000
        info = EngineInfo(
            max_model_len=1 << 18, num_blocks=num_blocks, block_size=BLOCK_SIZE, max_num_seqs=2 * arguments.running,
            max_num_batched_tokens=arguments.running + 2048, max_num_waiting=1 << 20, dtype="", vocab_size=1 << 17,
            device="", kernels="", num_threads=1, enable_prefix_caching=True,
        )  # fmt: skip
        kv = KVManager((KVGroupSpec((0,)),), BlockPool(num_blocks), BLOCK_SIZE)
        context = PolicyContext(
            clock=self.clock,
            num_blocks=num_blocks,
            num_cached_tokens=lambda request: kv.match(request).num_tokens,
            num_blocks_needed=lambda request: kv.num_blocks_to_reach(request, request.num_tokens),
        )
        self.scheduler = Scheduler(
            POLICIES[arguments.policy](context),
            kv,
            self.clock,
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
        )
        tenants = parse_tenants(["*:max_pin_share=1"])
        self.tenancy = Tenancy(self.scheduler, self.clock, info, tenants, KVCosts(chunk=512))
        self.tenancy.costs.prefill.observe(100, 0.0, 1.0)
        self.num_sent = 0
        self.max_model_len = info.max_model_len
        self.times: dict[str, list[float]] = {}

    def timed(self, name: str, function: Callable[[], object]) -> object:
        started_s = time.thread_time()
        result = function()
        self.times.setdefault(name, []).append(1e3 * (time.thread_time() - started_s))
        return result

    def send(self, name: str, num_tokens: int = NUM_PROMPT_TOKENS) -> None:
        self.num_sent += 1
        program = self.rng.randrange(2000)
        submission = Submission(
            request_id=f"r{self.num_sent}",
            prompt_token_ids=[program % 7] * 64 + [self.rng.randrange(30_000) for _ in range(num_tokens - 64)],
            sampling=SamplingParams(max_tokens=4000, seed=1),
            tenant_id=f"tenant-{program % 100}",
            session_id=f"session-{program}" if program % 2 else None,
            timeout_s=1e6,
        )
        requests = self.timed(
            name,
            lambda: self.tenancy.admit(
                submission, lambda: make_requests(submission, self.clock.now_s(), self.max_model_len)
            ),
        )
        assert isinstance(requests, list)
        self.scheduler.add(requests[0])

    def step(self, *, is_timed: bool) -> None:
        timed = self.timed if is_timed else lambda _, function: function()
        batch = self.scheduler.schedule()
        timed("step: make_room", self.tenancy.make_room)
        assert batch is not None
        timed("step: scheduled", lambda: self.tenancy.scheduled(batch))
        result = StepResult(batch.step_id, tuple((7,) if scheduled.samples else () for scheduled in batch.requests))
        timed("step: computed", lambda: self.tenancy.computed(batch, result))
        self.scheduler.update(batch, result)
        self.scheduler.events.clear()

    def run(self) -> None:
        arguments, pool = self.arguments, self.scheduler.kv.pool
        for _ in range(arguments.running):
            self.send("warm up")
        while len(self.scheduler.policy) or any(r.num_remaining_tokens > 1 for r in self.scheduler.running):
            self.step(is_timed=False)
        for index in range(arguments.pins):
            block_ids = pool.try_allocate(PIN_BLOCKS)
            assert block_ids is not None
            tenant_id = f"tenant-{index % 100}"
            pin = Pin(tenant_id=tenant_id, program_arrival_s=0.0, block_ids=tuple(block_ids), expires_s=1e18)
            assert self.tenancy.pins.try_pin(pin)
            pool.release(block_ids)
        pool.try_allocate(pool.num_available - arguments.running * (arguments.steps // BLOCK_SIZE + 2))
        for _ in range(arguments.waiting):
            self.send("arrival of 500 tokens")
        for _ in range(arguments.steps):
            self.step(is_timed=True)
            self.timed("step: expire", self.tenancy.expire)
        for request in self.scheduler.running[: arguments.steps]:
            self.timed("end of a request", lambda request=request: self.tenancy.ended(request, FinishReason.STOP))
        for _ in range(20):
            self.send(f"arrival of {LONG_PROMPT_TOKENS} tokens", LONG_PROMPT_TOKENS)
        self.timed("stats", self.tenancy.stats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=1024)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--pins", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--policy", default="agent", choices=sorted(POLICIES))
    bench = Bench(parser.parse_args())
    gc.disable()
    bench.run()
    print(f"{'':30}    p50      p99 ms")
    for name, times in bench.times.items():
        times.sort()
        print(f"{name:30} {statistics.median(times):7.3f} {times[int(0.99 * len(times))]:7.3f}")


if __name__ == "__main__":
    main()
