"""Two ranks, each a process, over gloo: the text of one rank, with every kind of layer; and a rank that is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pelton.build import PeltonConfig, build_engine
from pelton.core.errors import ConfigError, EngineStepError
from pelton.engine.engine import Engine
from pelton.worker.executors.sharded import ShardedExecutor
from tests.make import generate, make_submission
from tests.weights.make_tokenizers import train_byte_level
from tests.worker.tiny_models import save_tiny

pytestmark = pytest.mark.torch

SETTINGS: dict[str, Any] = {
    "num_kv_blocks": 60,
    "block_size": 8,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 12,
    "host_kv_cache_gb": 0.0001,
    "threads": 1,
    "kv_cache_dtype": "float32",
}


@pytest.fixture(autouse=True)
def keep_thread_count() -> Any:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_tiny(request.param, tmp_path / "model")
    train_byte_level().save(str(tmp_path / "model" / "tokenizer.json"))
    return tmp_path / "model"


def build(model: Path, **settings: Any) -> Engine:
    return build_engine(PeltonConfig.of({"model": str(model), **SETTINGS, **settings}))


def answers(engine: Engine, num_tokens: int = 12) -> dict[tuple[str, int], list[int]]:
    options: dict[str, Any] = {"max_tokens": num_tokens, "ignore_eos": True}
    if num_tokens < 12:  # for an interpreter
        return generate(engine, make_submission(range(3, 12), "greedy", **options))
    return generate(
        engine,
        make_submission(range(3, 40), "greedy", **options),
        make_submission([5, 6, 7], "drawn", temperature=0.8, top_p=0.9, seed=1, **options),
        make_submission([9] * 5, "penalty", presence_penalty=0.5, **options),
    )


@pytest.mark.parametrize(
    ("model", "backend", "num_tokens"),
    [
        ("llama-mha-bias", "auto", 12),  # biases of all kinds
        ("qwen3-moe", "reference", 12),
        ("gemma2", "reference", 12),  # soft caps, groups of layers
        ("qwen2-tied", "triton", 3),
    ],
    indirect=["model"],
)
def test_two_ranks_write_what_one_writes(model: Path, backend: str, num_tokens: int) -> None:
    found = []
    for size in (1, 2):
        engine = build(model, kernel_backend=backend if size == 2 else "reference", tensor_parallel_size=size)
        try:
            assert isinstance(engine.executor, ShardedExecutor) == (size == 2)
            found.append(answers(engine, num_tokens))
        finally:
            engine.executor.close()
        assert not torch.distributed.is_initialized()
    assert found[0] == found[1]
    assert all(len(token_ids) == num_tokens for token_ids in found[0].values())


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_rank_that_is_lost_fails_what_runs(model: Path) -> None:
    engine = build(model, tensor_parallel_size=2)
    try:
        assert answers(engine)
        children = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True
        ).stdout
        (pid,) = (int(line.split()[0]) for line in children.splitlines() if "rank_process" in line)
        engine.submit(make_submission(range(3, 20), "lost", max_tokens=12, ignore_eos=True))
        os.kill(pid, signal.SIGKILL)
        problems: list[str] = []
        with pytest.raises(EngineStepError, match="rank"):
            run_on(engine, problems)
        assert all("rank" in problem for problem in problems)
    finally:
        engine.executor.close()


def run_on(engine: Engine, problems: list[str]) -> None:
    """With new requests in every turn; `problems` takes what their outputs say."""
    for _ in range(1000):
        engine.dispatch()
        if engine.num_in_flight:
            engine.collect()
        if (update := engine.take_update()) is not None:
            problems += [output.error.message for output in update.outputs if output.error is not None]
        engine.submit(make_submission([3, 4], max_tokens=2, ignore_eos=True))
        time.sleep(0.01)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tensor_parallel_size": 3}, "does not divide the model's 4 query heads"),
        ({"tensor_parallel_size": 2, "kernel_backend": "native"}, "native kernels run on one rank"),
        ({"tensor_parallel_size": 2, "lora_modules": ("a=/nowhere",)}, "adapters run on one rank"),
        ({"tensor_parallel_size": 2, "disk_kv_cache_dir": "/nowhere"}, "leave disk_kv_cache_dir out"),
        ({"tensor_parallel_size": 0}, "must be at least 1"),
    ],
    ids=str,
)
def test_what_ranks_cannot_do_is_refused(model: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(model, **settings)
