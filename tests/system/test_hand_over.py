"""A prompt computed by one process and continued by another: the same tokens, whatever becomes of the first one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from pelton import LLM, SamplingParams
from pelton.core.errors import ConfigError
from pelton.engine.kv import peer_wait
from tests.system.server import run_server
from tests.weights.make_tokenizers import train_byte_level

SAMPLING = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
TINY: dict[str, Any] = {"num_kv_blocks": 120, "max_model_len": 256, "block_size": 8, "max_num_batched_tokens": 24}


@pytest.fixture(autouse=True)
def no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model computes faster than a busy machine may answer."""
    monkeypatch.setattr(peer_wait, "MIN_WAIT_S", 20.0)


@contextlib.contextmanager
def other_engine(prompts: list[list[int]], lora: str | None = None, **settings: Any) -> Iterator[subprocess.Popen[str]]:
    """A process with the KV of `prompts`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.llm_process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps({"settings": settings, "prompts": prompts, "lora": lora}) + "\n")
        process.stdin.flush()
        while (line := process.stdout.readline()) != "ready\n":
            assert line, "the engine did not start"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def tiny(row: str, folder: Path) -> str:
    from tests.worker.tiny_models import save_tiny

    save_tiny(row, folder)
    train_byte_level().save(str(folder / "tokenizer.json"))
    return str(folder)


def answers(llm: LLM, prompts: list[list[int]], lora: str | None = None) -> tuple[list[list[int]], list[int]]:
    """Token ids, and how many prompt tokens were cached, of each prompt."""
    found = llm.generate(prompts, SAMPLING, lora=lora)
    return [answer.sequences[0].token_ids for answer in found], [answer.num_cached_tokens for answer in found]


@pytest.mark.torch
@pytest.mark.parametrize(
    ("row", "backend"), [("qwen2", "auto"), ("mistral-window", "auto"), ("gemma2", "reference"), ("llama", "reference")]
)
@pytest.mark.parametrize("kv_transfer_gb", [0.01, 0.00001], ids=["all at once", "few at a time"])
def test_tokens_are_those_of_one_engine(row: str, backend: str, kv_transfer_gb: float, tmp_path: Path) -> None:
    model = tiny(row, tmp_path / "model")
    prompts = [[(7 * i + start) % 200 + 3 for i in range(length)] for start, length in enumerate((17, 40, 100, 131))]
    settings: dict[str, Any] = {"model": model, "kernel_backend": backend, **TINY}
    with LLM(**settings) as llm:
        expected, cached = answers(llm, prompts)
        assert cached == [0, 0, 0, 0]
    settings["kv_transfer_gb"] = kv_transfer_gb if backend == "auto" else 3 * kv_transfer_gb
    address = f"unix:{tmp_path / 'kv'}"
    with (
        other_engine(prompts, kv_listen=address, max_num_seqs=3, **settings),
        LLM(kv_peers=(address,), host_kv_cache_gb=0.0, **settings) as llm,
    ):
        assert answers(llm, prompts) == (expected, [16, 32, 96, 128])
        assert llm.stats.num_peer_failed_blocks_total == 0
        received = llm.stats.num_peer_received_blocks_total
        assert received >= (12 if "window" in row else 34)  # what a window has left is not asked for
        assert answers(llm, prompts) == (expected, [16, 32, 96, 128])  # by now its own
        assert llm.stats.num_peer_received_blocks_total == received


@pytest.mark.torch
def test_two_engines_that_ask_each_other(tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "model")
    addresses = [f"unix:{tmp_path / name}" for name in "ab"]
    settings = TINY | {"num_kv_blocks": 240}
    prompts = [[(7 * i + start) % 200 + 3 for i in range(100)] for start in range(12)]
    with LLM(model, **settings) as llm:
        expected, _ = answers(llm, prompts)
    with (
        LLM(model, kv_listen=addresses[0], kv_peers=(addresses[1],), **settings) as first,
        LLM(model, kv_listen=addresses[1], kv_peers=(addresses[0],), **settings) as second,
        ThreadPoolExecutor(2) as threads,
    ):
        halves = [threads.submit(answers, llm, prompts[low : low + 6]) for llm, low in ((first, 0), (second, 6))]
        assert [answer for half in halves for answer in half.result(60)[0]] == expected
        both = [threads.submit(answers, llm, prompts) for llm in (first, second)]
        for future in both:
            assert future.result(60)[0] == expected
        assert first.stats.num_peer_received_blocks_total > 0
        assert second.stats.num_peer_received_blocks_total > 0


@pytest.mark.torch
def test_another_model_and_another_tenant_get_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny("llama", tmp_path / "model")
    other = tiny("llama", tmp_path / "other")
    prompts = [[i % 200 + 3 for i in range(100)]]
    address = f"unix:{tmp_path / 'kv'}"
    with other_engine(prompts, model=model, kv_listen=address, **TINY):
        with LLM(other, kv_peers=(address,), **TINY) as llm:
            assert answers(llm, prompts)[1] == [0]
        assert "its model, kernels or KV cache are others" in capfd.readouterr().err
        with LLM(model, kv_peers=(address,), kv_cache_dtype="float32", **TINY) as llm:
            assert answers(llm, prompts)[1] == [0]
        assert "KV blocks have" in capfd.readouterr().err
        with LLM(model, kv_peers=(address,), **TINY) as llm:
            assert answers(llm, prompts)[1] == [96]


@pytest.mark.torch
def test_an_adapter_finds_what_it_has_computed(tmp_path: Path) -> None:
    """By whatever name it goes; the model without it finds nothing of it, and it nothing of the model."""
    from tests.make_lora import ATTENTION, save_adapter
    from tests.worker.tiny_models import make_tiny

    model = tiny("llama", tmp_path / "model")
    save_adapter(make_tiny("llama"), tmp_path / "adapter", r=4, target_modules=ATTENTION)
    prompts = [[i % 200 + 3 for i in range(100)]]
    address = f"unix:{tmp_path / 'kv'}"
    with LLM(model, lora_modules=(f"own={tmp_path / 'adapter'}",), **TINY) as llm:
        expected, _ = answers(llm, prompts, "own")
        assert answers(llm, prompts)[0] != expected
    first = {"model": model, "kv_listen": address, "lora_modules": [f"theirs={tmp_path / 'adapter'}"], **TINY}
    with (
        other_engine(prompts, lora="theirs", **first),
        LLM(model, lora_modules=(f"own={tmp_path / 'adapter'}",), kv_peers=(address,), **TINY) as llm,
    ):
        assert answers(llm, prompts)[1] == [0]
        assert answers(llm, prompts, "own") == (expected, [96])


@pytest.mark.torch
def test_settings_that_do_not_go_together(tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "model")
    address = f"unix:{tmp_path / 'kv'}"
    for settings, problem in (
        ({"enable_prefix_caching": False}, "need prefix caching"),
        ({"tensor_parallel_size": 2}, "from one rank only"),
        ({"kv_connector": "cuda_ipc"}, "runs on a CPU: use shared_memory"),
        ({"kv_transfer_gb": 1e6}, "GiB are free"),
        ({"kv_transfer_gb": 1e-9}, "too little for one KV block"),
    ):
        with pytest.raises(ConfigError, match=problem):
            LLM(model, kv_listen=address, **(TINY | settings))


def make_prompt(seed: int, num_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000, 50_000) for _ in range(num_tokens)]


@pytest.mark.model
async def test_real_model_behind_two_servers(default_model_path: Path, tmp_path: Path) -> None:
    """The same text and no prompt computed twice; another salt finds nothing; the first engine is killed in the
    middle of transfers and stopped dead, and nobody waits for it; it comes back and is used again."""
    flags = ("--max-model-len", "2048", "--num-kv-blocks", "300", "--host-kv-cache-gb", "0")
    flags += ("--kv-transfer-gb", "0.002")  # some ten blocks: a prompt takes many steps
    prompts = [make_prompt(seed, 400) for seed in range(8)]
    async with run_server(default_model_path, *flags) as alone:
        expected = [await text_of(alone, prompt) for prompt in prompts]
    address = f"unix:{tmp_path / 'kv'}"
    async with (
        run_server(default_model_path, *flags, "--kv-listen", address) as first,
        run_server(default_model_path, *flags, "--kv-peers", address) as second,
    ):
        cached = []
        for prompt, (text, _) in zip(prompts[:2], expected, strict=False):  # twice: a busy machine may be late once
            await first.complete(prompt, max_tokens=1)
            answer = await second.complete(prompt, max_tokens=8)
            assert answer["choices"][0]["text"] == text
            cached.append(cached_of(answer))
        assert 400 - 16 in cached
        assert cached_of(await second.complete(prompts[0], max_tokens=1, cache_salt="another")) == 0

        for index, delay_s in enumerate((0.0, 0.005, 0.02), 2):
            await first.complete(prompts[index], max_tokens=1)
            (engine,) = first.engine_processes()
            asking = asyncio.create_task(second.complete(prompts[index], max_tokens=8))
            await asyncio.sleep(delay_s)
            engine.kill()
            assert (await asking)["choices"][0]["text"] == expected[index][0]
            while await has_no_other_engine(first, engine):
                await asyncio.sleep(0.02)
            await first.wait_ready()
        await asyncio.sleep(1.1)  # then it is asked again
        await first.complete(prompts[5], max_tokens=1)
        assert cached_of(await second.complete(prompts[5], max_tokens=8)) > 0

        await first.complete(prompts[6], max_tokens=1)
        (engine,) = first.engine_processes()
        engine.send_signal(signal.SIGSTOP)
        started_s = time.monotonic()
        answer = await second.complete(prompts[6], max_tokens=8)
        assert time.monotonic() - started_s < 30  # not for ever; some two seconds
        assert answer["choices"][0]["text"] == expected[6][0]
        engine.send_signal(signal.SIGCONT)
        assert await second.gauge("pelton:kv_peer_received_blocks_total") > 24
        assert await second.gauge("pelton:kv_peer_failed_blocks_total") > 0


async def text_of(server: Any, prompt: list[int]) -> tuple[str, int]:
    answer = await server.complete(prompt, max_tokens=8)
    return answer["choices"][0]["text"], cached_of(answer)


def cached_of(answer: dict[str, Any]) -> int:
    cached: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached


async def has_no_other_engine(server: Any, engine: psutil.Process) -> bool:
    """Until the server has noticed the end of `engine` and started another one."""
    with contextlib.suppress(psutil.Error):  # one that has just ended
        return not [process for process in server.engine_processes() if process.pid != engine.pid]
    return True
