"""What a decode step costs outside the kernels: scheduling, bookkeeping, text, wire, HTTP.

    python benchmarks/step_overhead.py --model MODEL [--requests 32] [--tokens 400] [--step-ms 20]

The production server and engine processes run as `pelton serve` runs them, with the model's own
tokenizer; only the executor is replaced: it multiplies matrices for as long as a step takes, on its own
thread, and answers with random tokens of the model's vocabulary. All other CPU time of the two processes
while every request decodes, read from the kernel's scheduler per thread, is overhead; it is divided by the
number of steps. Clients run in a third process (this one).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import aiohttp
import numpy as np

from pelton.core.batch import ScheduledBatch, StepResult
from pelton.core.events import EngineInfo
from pelton.core.model_spec import KVGroupSpec
from pelton.core.protocols import MonotonicClock
from pelton.engine.child import run_engine_process
from pelton.engine.client import EngineClient
from pelton.engine.engine import Engine
from pelton.engine.kv.block_pool import BlockPool
from pelton.engine.kv.manager import KVManager
from pelton.engine.policies.fcfs import FCFSPolicy
from pelton.engine.process import ProcessTransport
from pelton.engine.scheduler import Scheduler

EXECUTOR_THREAD = "executor"


def name_this_thread(name: str) -> None:
    """So that its time can be told from the others' in /proc."""
    Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)


class BusyExecutor:
    """Every step takes `step_s` of one core, as kernels would, and samples among a few thousand words, as texts do."""

    def __init__(self, step_s: float, vocab_size: int) -> None:
        self._step_s = step_s
        self._rng = random.Random(1)
        self._vocab_size = vocab_size
        self._thread = ThreadPoolExecutor(1, EXECUTOR_THREAD)
        self._matrix = np.ones((256, 256), np.float32)

    def submit(self, batch: ScheduledBatch) -> Future[StepResult]:
        return self._thread.submit(self._execute, batch)

    def _execute(self, batch: ScheduledBatch) -> StepResult:
        end_s = time.monotonic() + self._step_s
        name_this_thread(EXECUTOR_THREAD)
        while time.monotonic() < end_s:
            np.matmul(self._matrix, self._matrix)
        sampled = tuple((self._rng.randrange(1000, 4000),) if scheduled.samples else () for scheduled in batch.requests)
        return StepResult(batch.step_id, sampled, elapsed_s=self._step_s)

    def close(self) -> None:
        self._thread.shutdown()


def build_engine(settings: bytes) -> Engine:
    from pelton.weights.tokenizer import load_tokenizer

    options = json.loads(settings)
    tokenizer = load_tokenizer(Path(options["model"]))
    info = EngineInfo(
        max_model_len=8192,
        num_blocks=8192,
        block_size=16,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        max_num_waiting=1024,
        dtype="none",
        vocab_size=150_000,
        device="none",
        kernels="none",
        num_threads=1,
        enable_prefix_caching=True,
    )
    clock = MonotonicClock()
    kv = KVManager((KVGroupSpec((0,)),), BlockPool(info.num_blocks), info.block_size)
    scheduler = Scheduler(
        FCFSPolicy(),
        kv,
        clock,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
    )
    return Engine(scheduler, BusyExecutor(options["step_s"], info.vocab_size), tokenizer, clock, info)


def run_server(model: str, step_s: float, port: int) -> int:
    from pelton.serving.app import create_app
    from pelton.serving.config import ServerConfig
    from pelton.serving.context import ModelCard
    from pelton.serving.server import run_server as serve
    from pelton.weights.tokenizer import load_tokenizer

    settings = json.dumps({"model": model, "step_s": step_s}).encode()
    client = EngineClient(ProcessTransport([sys.executable, __file__, "--role", "engine"], settings))
    config = ServerConfig(port=port, log_level="warning")
    card = ModelCard(names=("none",), root=model, max_model_len=8192, created=0)
    return serve(lambda: create_app(client, load_tokenizer(Path(model)), card, config), client, config)


def cpu_s(pid: int) -> float:
    """CPU seconds of all threads but the executor's, which stands for the kernels."""
    total_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        if not (task / "comm").read_text().startswith(EXECUTOR_THREAD):
            total_ns += int((task / "schedstat").read_text().split()[0])
    return total_ns / 1e9


def engine_pid(server_pid: int) -> int:
    for pid in Path(f"/proc/{server_pid}/task/{server_pid}/children").read_text().split():
        if "engine" in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
            return int(pid)
    raise RuntimeError("the engine process is not running")


async def count_tokens(http: aiohttp.ClientSession, url: str) -> float:
    async with http.get(f"{url}/metrics") as response:
        text = await response.text()
    return sum(map(float, re.findall(r"^vllm:generation_tokens_total\S* (\S+)$", text, re.MULTILINE)))


async def measure(url: str, server_pid: int, num_requests: int, num_tokens: int) -> dict[str, float]:
    engine = engine_pid(server_pid)
    started = asyncio.Semaphore(0)
    done = asyncio.Event()

    async def stream(http: aiohttp.ClientSession, index: int) -> None:
        body = {
            "prompt": [index + 1] * 64,
            "max_tokens": num_tokens,
            "stream": True,
            "ignore_eos": True,
            "temperature": 0,
        }
        async with http.post(f"{url}/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            await response.content.readany()
            started.release()
            async for _ in response.content.iter_any():
                pass
        done.set()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        tasks = [asyncio.create_task(stream(http, index)) for index in range(num_requests)]
        for _ in range(num_requests):
            await started.acquire()
        before = (cpu_s(server_pid), cpu_s(engine), await count_tokens(http, url))
        await done.wait()
        after = (cpu_s(server_pid), cpu_s(engine), await count_tokens(http, url))
        await asyncio.gather(*tasks)
    steps = (after[2] - before[2]) / num_requests
    return {
        "steps": steps,
        "server_ms_per_step": 1000 * (after[0] - before[0]) / steps,
        "engine_ms_per_step": 1000 * (after[1] - before[1]) / steps,
        "total_ms_per_step": 1000 * (after[0] + after[1] - before[0] - before[1]) / steps,
    }


async def wait_ready(url: str) -> None:
    async with aiohttp.ClientSession() as http:
        for _ in range(600):
            try:
                async with http.get(f"{url}/ready") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)
    raise RuntimeError("the server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a .gguf file or a folder, for its tokenizer")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--port", type=int, default=8199)
    parser.add_argument("--role", choices=("measure", "server", "engine"), default="measure")
    args = parser.parse_args()
    if args.role == "engine":
        sys.exit(run_engine_process(build_engine))
    if args.role == "server":
        sys.exit(run_server(args.model, args.step_ms / 1000, args.port))
    command = [sys.executable, __file__, "--role", "server", "--model", args.model]
    command += ["--step-ms", str(args.step_ms), "--port", str(args.port)]
    url = f"http://127.0.0.1:{args.port}"
    # The matrix product of one thread, so that no other thread works for the executor.
    with subprocess.Popen(command, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"}) as server:
        try:
            asyncio.run(wait_ready(url))
            for _ in range(args.runs):
                figures = asyncio.run(measure(url, server.pid, args.requests, args.tokens))
                print(json.dumps({name: round(value, 3) for name, value in figures.items()}), flush=True)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
