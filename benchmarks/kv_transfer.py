"""Speed of the connectors between two processes, and what a hand-over saves.

    python benchmarks/kv_transfer.py [MODEL.gguf] --connector shared_memory

Prints one JSON line a measurement. `blocks`: bytes/s of blocks that are copied, read, checked, with no engine at either
end. With a model: time to the first token of a prompt that the engine computes, and that another process has computed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from pelton import LLM, SamplingParams
from pelton.cluster.config import TransferConfig
from pelton.cluster.transfer import open_connector
from pelton.cluster.transfer.connector import PeerConnector
from pelton.core.batch import BlockKey
from pelton.core.events import EngineInfo
from pelton.engine.kv.transfer import FETCH_BLOCKS

NUM_SLOTS = 256
FIRST_TOKEN = SamplingParams(temperature=0, max_tokens=1)


def tell(name: str, **values: Any) -> None:
    print(json.dumps({"measurement": name, **values}), flush=True)


def make_connector(settings: dict[str, Any], block_bytes: int) -> PeerConnector:
    info = EngineInfo(
        max_model_len=1,
        num_blocks=1,
        block_size=16,
        max_num_seqs=1,
        max_num_batched_tokens=1,
        max_num_waiting=1,
        dtype="bfloat16",
        vocab_size=1,
        device="cpu",
        kernels="none",
        num_threads=1,
        enable_prefix_caching=True,
        kv_block_bytes=block_bytes,
    )
    gb = (NUM_SLOTS + 0.5) * block_bytes / 2**30
    return open_connector(TransferConfig(**settings, kv_transfer_gb=gb), info)


def give(settings: dict[str, Any], block_bytes: int) -> None:
    """The other process: has every block, in slots that were written long ago."""
    woken = threading.Event()
    connector = make_connector(settings, block_bytes)
    connector.outbox[:] = 77
    connector.wake_with(woken.set)
    print("ready", flush=True)
    next_slot = 0
    while True:
        woken.wait()
        woken.clear()
        for wanted in connector.take_wanted():
            wanted.offer.set_result(tuple((next_slot + i) % NUM_SLOTS for i in range(len(wanted.keys))))
            next_slot += len(wanted.keys)


def prefill(settings: dict[str, Any], prompts: list[list[int]]) -> None:
    """The other process: has computed `prompts`."""
    with LLM(**settings) as llm:
        llm.generate(prompts, FIRST_TOKEN)
        print("ready", flush=True)
        sys.stdin.read()


def start(kind: str, *arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--child", json.dumps([kind, *arguments])]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    while (line := child.stdout.readline()) != "ready\n":
        if not line:
            raise RuntimeError("the other process has ended")
    return child


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()


def measure_blocks(name: str, address: str, block_bytes: int, num_blocks: int) -> None:
    child = start("give", {"kv_connector": name, "kv_listen": address}, block_bytes)
    connector = make_connector({"kv_connector": name, "kv_peers": (address,)}, block_bytes)
    try:
        keys: list[BlockKey] = [(0, index.to_bytes(16, "little")) for index in range(num_blocks)]
        times_s = []
        for _ in range(6):
            start_s = time.perf_counter()
            futures = [
                connector.fetch([(low + i) % NUM_SLOTS for i in range(FETCH_BLOCKS)], keys[low : low + FETCH_BLOCKS])
                for low in range(0, num_blocks, FETCH_BLOCKS)
            ]
            assert all(all(future.result().loaded) for future in futures)
            times_s.append(time.perf_counter() - start_s)
        gb_s = [num_blocks * block_bytes / time_s / 1e9 for time_s in times_s[1:]]  # the first one connects
        tell(
            "blocks",
            connector=name,
            address=address.partition(":")[0],
            block_bytes=block_bytes,
            blocks=num_blocks,
            gb_s=round(statistics.median(gb_s), 2),
            least_gb_s=round(min(gb_s), 2),
        )
    finally:
        connector.close()
        end(child)


def measure_first_token(model: str, name: str, address: str, num_tokens: int) -> None:
    prompts = [[(index * 7919 + first) % 50_000 + 1000 for index in range(num_tokens)] for first in range(4)]
    settings: dict[str, Any] = {"model": model, "max_model_len": 8192, "num_kv_blocks": 1200, "kv_connector": name}
    child = start("prefill", {**settings, "kv_listen": address}, prompts)
    try:
        for kind, own in (("computed", {}), ("handed over", {"kv_peers": (address,)})):
            times_ms = []
            with LLM(**settings, **own) as llm:
                llm.generate([1000], FIRST_TOKEN)
                for prompt in prompts:
                    start_s = time.perf_counter()
                    (answer,) = llm.generate([prompt], FIRST_TOKEN)
                    times_ms.append(1e3 * (time.perf_counter() - start_s))
            tell(
                "first token",
                connector=name,
                kv=kind,
                tokens=num_tokens,
                cached=answer.num_cached_tokens,
                ms=round(statistics.median(times_ms)),
                all_ms=[round(time_ms) for time_ms in times_ms],
            )
    finally:
        end(child)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a model on disk, for times to the first token")
    parser.add_argument("--connector", default="shared_memory", help="shared_memory or nixl")
    parser.add_argument("--address", help="default: a Unix socket")
    parser.add_argument("--block-bytes", type=int, default=196_608, help="default: 16 tokens of a 0.5B model")
    parser.add_argument("--blocks", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=2000, help="of a prompt")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        kind, *rest = json.loads(arguments.child)
        {"give": give, "prefill": prefill}[kind](*rest)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        address = arguments.address or f"unix:{folder}/kv"
        measure_blocks(arguments.connector, address, arguments.block_bytes, arguments.blocks)
        if arguments.model is not None:
            measure_first_token(arguments.model, arguments.connector, address, arguments.tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
