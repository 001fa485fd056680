"""Prefix hit rates of the eviction methods over a trace of block hashes (Mooncake's format), pool by pool.

    python benchmarks/kv_eviction.py mooncake_conversation_trace.jsonl --blocks 1000 3000 10000

Drives the production `BlockPool`: a request shares what it finds of its chain and publishes the rest. No model,
no scheduler: requests come and go one after another at the trace's times.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from pelton.engine.kv.block_pool import BlockPool
from pelton.engine.kv.eviction import EVICTIONS


class TraceClock:
    def __init__(self) -> None:
        self.time_s = 0.0

    def now_s(self) -> float:
        return self.time_s


def replay(requests: list[tuple[float, list[int]]], method: str, num_blocks: int) -> tuple[int, int]:
    """Blocks asked for, and blocks found."""
    clock = TraceClock()
    pool = BlockPool(num_blocks, EVICTIONS[method](clock, lambda _: 1.0))
    num_asked = num_found = 0
    for time_s, chain in requests:
        clock.time_s = time_s
        keys = [(0, hash_id.to_bytes(16, "big")) for hash_id in chain[: num_blocks - 1]]
        table = []
        for key in keys:
            block_id = pool.find(key)
            if block_id is None:
                break
            table.append(block_id)
        generation = pool.blocks[table[-1]].generation + 1 if table else 0
        pool.share(table)
        num_asked += len(keys)
        num_found += len(table)
        taken = pool.try_allocate(len(keys) - len(table))
        assert taken is not None
        for index in range(len(table), len(keys)):
            block_id = taken[index - len(keys)]
            stale = pool.find(keys[index])
            if stale is not None:
                pool.unpublish(stale)
            pool.publish(block_id, keys[index], index, generation)
            table.append(block_id)
        for block_id in table:
            pool.blocks[block_id].num_turns = max(pool.blocks[block_id].num_turns, generation)
        pool.release(reversed(table))
    return num_asked, num_found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1000, 3000, 10000, 30000])
    args = parser.parse_args()
    requests = []
    with args.trace.open() as lines:
        for line in lines:
            entry = json.loads(line)
            requests.append((entry["timestamp"] / 1000, entry["hash_ids"]))
    for num_blocks in args.blocks:
        rates = []
        for method in EVICTIONS:
            start_s = time.perf_counter()
            num_asked, num_found = replay(requests, method, num_blocks)
            rates.append(f"{method} {num_found / num_asked:.4f} ({time.perf_counter() - start_s:.1f} s)")
        print(f"{num_blocks:>8} blocks  " + "  ".join(rates), flush=True)


if __name__ == "__main__":
    main()
