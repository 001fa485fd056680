"""What preemption and a restart cost with and without the tiers behind the KV cache, on a real model.

    python benchmarks/kv_tiers.py MODEL.gguf --folder /tmp/kv

Prints one JSON line a measurement: recomputed tokens and time at a cache for a quarter of what is asked for, with
host memory and without; speeds of every way between the tiers in GB/s; hits after a restart.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np

from pelton import LLM, SamplingParams
from pelton.core.batch import KVOp, KVOpKind
from pelton.core.model_spec import ModelSpec
from pelton.weights.model_files import open_model
from pelton.worker.kernels.ops import make_kernels
from pelton.worker.kv_disk import DiskStore
from pelton.worker.kv_storage import KVStorage

NUM_BLOCKS = 1024


def tell(name: str, **values: Any) -> None:
    print(json.dumps({"measurement": name, **values}), flush=True)


def make_prompts(count: int, num_tokens: int) -> list[list[int]]:
    rng = random.Random(11)
    return [[rng.randrange(1000, 50_000) for _ in range(num_tokens)] for _ in range(count)]


def measure_speeds(spec: ModelSpec, folder: Path) -> None:
    """Median of five passes over `NUM_BLOCKS` blocks; files come from the page cache."""
    kv = KVStorage(spec, NUM_BLOCKS + 1, 16, "bfloat16", make_kernels("native"), num_host_blocks=NUM_BLOCKS + 1)
    kv._data[:] = 1
    num_bytes = kv.num_bytes / (NUM_BLOCKS + 1) * NUM_BLOCKS
    block_ids = np.random.default_rng(0).permutation(NUM_BLOCKS) + 1
    store = DiskStore(folder, "benchmark", kv.num_bytes // (NUM_BLOCKS + 1), kv.host_block)
    keys = [(0, int(block_id).to_bytes(16, "little")) for block_id in block_ids]
    slot_ids = block_ids.tolist()

    def store_ops() -> None:
        kv.move(KVOp(KVOpKind.STORE, block_id, block_id, "host") for block_id in slot_ids)

    def load_ops() -> None:
        kv.move(KVOp(KVOpKind.LOAD, block_id, block_id, "host") for block_id in slot_ids)

    def write() -> None:
        wait([store.store(slot_id, key) for slot_id, key in zip(slot_ids, keys, strict=True)])

    def read() -> None:
        reads = [store.load(slot_ids[low : low + 16], keys[low : low + 16]) for low in range(0, NUM_BLOCKS, 16)]
        assert all(all(each.result().loaded) for each in reads)

    for name, copy in (("device_to_host", store_ops), ("host_to_device", load_ops), ("write", write), ("read", read)):
        copy()
        times_s = []
        for _ in range(5):
            start_s = time.perf_counter()
            copy()
            times_s.append(time.perf_counter() - start_s)
        tell(name, gb_per_s=round(num_bytes / sorted(times_s)[2] / 1e9, 2), block_kib=store.block_bytes / 1024)
    store.close()


def measure_preemption(model: str, prompts: list[list[int]], num_output_tokens: int) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=num_output_tokens, ignore_eos=True)
    num_blocks = len(prompts) * -(-(len(prompts[0]) + num_output_tokens) // 16)
    settings: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": len(prompts)}
    expected = None
    for name, own in (
        ("unpressured", {"num_kv_blocks": num_blocks + 1}),
        ("quarter_with_host", {"num_kv_blocks": num_blocks // 4 + 1, "host_kv_cache_gb": 0.5}),
        ("quarter_recompute_only", {"num_kv_blocks": num_blocks // 4 + 1, "host_kv_cache_gb": 0.0}),
    ):
        with LLM(model, **settings, **own) as llm:
            start_s = time.perf_counter()
            answers = [answer.sequences[0].token_ids for answer in llm.generate(prompts, sampling)]
            elapsed_s = time.perf_counter() - start_s
            stats = llm.stats
        expected = expected or answers
        num_computed = stats.num_prompt_tokens_total + stats.num_output_tokens_total + stats.num_recomputed_tokens_total
        tell(
            name,
            seconds=round(elapsed_s, 2),
            preemptions=stats.num_preemptions_total,
            recomputed_tokens=stats.num_recomputed_tokens_total,
            recomputed_share=round(stats.num_recomputed_tokens_total / num_computed, 4),
            blocks_loaded=stats.num_tier_loaded_blocks_total,
            same_output=answers == expected,
        )


def measure_restart(model: str, prompts: list[list[int]], folder: Path) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    for name in ("cold", "restarted"):
        with LLM(model, max_model_len=4096, disk_kv_cache_dir=str(folder)) as llm:
            start_s = time.perf_counter()
            answers = llm.generate(prompts, sampling)
            elapsed_s = time.perf_counter() - start_s
            cached = sum(answer.num_cached_tokens for answer in answers)
            tell(name, seconds=round(elapsed_s, 2), cached_share=round(cached / sum(map(len, prompts)), 4))
            time.sleep(1.0)  # written behind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--folder", type=Path, required=True, help="for block files; what it holds is deleted")
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    measure_speeds(open_model(Path(args.model)).spec, args.folder)
    shutil.rmtree(args.folder, ignore_errors=True)
    measure_preemption(args.model, make_prompts(16, 120), 120)
    measure_restart(args.model, make_prompts(4, 1500), args.folder)
    shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
