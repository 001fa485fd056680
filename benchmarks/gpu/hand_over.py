"""One prompt computed by a process and continued by another on the same device: blocks through CUDA's shared memory.

Under the interpreter, where there is no device to share, through shared memory of the host.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.engine_items import TINY
from benchmarks.gpu.running_engine import RunningEngine, make_prompts

from pelton.cluster.config import TransferConfig
from pelton.core.model_spec import ModelSpec, RopeSpec, make_kv_groups
from pelton.engine.kv.transfer import PEER

# Keys and values as many as an 8B's in a quarter of its layers, in little else.
WIDE = ModelSpec(
    architecture="llama",
    num_layers=8,
    hidden_size=512,
    intermediate_size=1024,
    num_heads=8,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=2048,
    max_model_len=4096,
    rms_norm_eps=1e-5,
    rope=RopeSpec(theta=1e4, rotary_dim=128),
    kv_groups=make_kv_groups([None] * 8),
)
_DEAR_S = 30.0
_CHILD = (
    "from benchmarks.gpu.absent_packages import stand_in; stand_in(); from benchmarks.gpu.hand_over import prefill; "
    "prefill()"
)


def _engine(tiny: bool, **transfer: Any) -> RunningEngine:
    settings: dict[str, Any] = {"max_num_seqs": 8, "enable_prefix_caching": True}
    settings |= {"max_num_batched_tokens": 16 if tiny else 2048, "num_kv_blocks": 64 if tiny else 1024}
    worker = {"kernel_backend": "triton"}
    config = TransferConfig(
        kv_connector="shared_memory" if tiny else "cuda_ipc", kv_transfer_gb=0.001 if tiny else 0.25, **transfer
    )
    spec = TINY if tiny else WIDE
    return RunningEngine(spec, worker, settings, same_weights=True, transfer=config if config.is_on else None)


def _prompts(tiny: bool) -> list[list[int]]:
    lengths = (37,) if tiny else (1000, 2000, 4000)
    return [make_prompts(TINY if tiny else WIDE, 1, length, length)[0] for length in lengths]


def prefill() -> None:
    """The other process: reads its settings from one line, says "ready", ends with its standard input."""
    settings = json.loads(sys.stdin.readline())
    with _engine(settings["tiny"], kv_listen=settings["address"]) as engine:
        engine.generate(_prompts(settings["tiny"]), 1)
        print("ready", flush=True)
        sys.stdin.read()


def hand_over(tiny: bool) -> list[dict[str, Any]]:
    """Tokens of one engine, and of two; raises where they differ, or a block did not come whole."""
    prompts, num_tokens = _prompts(tiny), 2 if tiny else 32
    with _engine(tiny) as alone:
        expected = [answer.token_ids for answer in alone.generate(prompts, num_tokens)]
    with tempfile.TemporaryDirectory() as folder:
        address = f"unix:{folder}/kv"
        command = [sys.executable, *(["-S"] if sys.flags.no_site else []), "-c", _CHILD]
        environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))}
        log = Path(folder) / "log"
        with log.open("w") as errors:
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps({"tiny": tiny, "address": address}) + "\n")
            child.stdin.flush()
            if child.stdout.readline() != "ready\n":
                raise RuntimeError(f"the process that prefills has ended: {log.read_text()[-2000:]}")
            with _engine(tiny, kv_peers=(address,)) as engine:
                costs = engine.engine.tenancy.costs
                costs.recompute_s = lambda *_: _DEAR_S  # so small a model is computed sooner than blocks are asked for
                found = [answer.token_ids for prompt in prompts for answer in engine.generate([prompt], num_tokens)]
                kv = engine.engine.scheduler.kv
                stats, bytes_per_s = kv.tier_stats(), costs.copies_from(PEER).bytes_per_s
        finally:
            child.kill()
            child.wait()
    num_blocks = sum((len(prompt) - 1) // kv.block_size for prompt in prompts)
    if (
        found != expected
        or stats["num_peer_failed_blocks_total"]
        or stats["num_peer_received_blocks_total"] < num_blocks
    ):
        raise AssertionError(f"{stats}, tokens {found} where one engine has {expected}")
    return [{"requests": len(prompts), "blocks": num_blocks, "gb_s": bytes_per_s / 1e9}]
