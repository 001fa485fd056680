"""Host memory and disk behind the KV cache of the real model: nothing lost, nothing wrong, whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from pelton import LLM, SamplingParams
from tests.system.server import Server, run_server

pytestmark = pytest.mark.model

BLOCK = 16
SAMPLING = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def make_prompts(count: int, num_tokens: int) -> list[list[int]]:
    rng = random.Random(11)
    return [[rng.randrange(1000, 50_000) for _ in range(num_tokens)] for _ in range(count)]


def generate(llm: LLM, prompts: list[list[int]], sampling: SamplingParams) -> tuple[list[list[int]], list[int]]:
    """Token ids, and how many prompt tokens were cached, of each prompt."""
    answers = llm.generate(prompts, sampling)
    return [answer.sequences[0].token_ids for answer in answers], [answer.num_cached_tokens for answer in answers]


def test_preempted_at_four_times_the_cache_without_losing_a_token(default_model_path: Path) -> None:
    """16 requests of 120 tokens in a cache for four: all complete as alone, and nothing is computed twice."""
    prompts = make_prompts(16, 40)
    settings: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 16}
    with LLM(str(default_model_path), **settings) as llm:
        expected, _ = generate(llm, prompts, SAMPLING)
        assert llm.stats.num_preemptions_total == 0
    num_blocks = 1 + 16 * 8 // 4
    with LLM(str(default_model_path), num_kv_blocks=num_blocks, host_kv_cache_gb=0.25, **settings) as llm:
        together, _ = generate(llm, prompts, SAMPLING)
        assert together == expected
        assert llm.stats.num_preemptions_total > 0
        assert llm.stats.num_tier_loaded_blocks_total > 0
        assert llm.stats.num_recomputed_tokens_total == 0
        assert llm.stats.num_blocks_used == 0


def wait_until_written(llm: LLM, num_blocks: int) -> None:
    """Statistics come with outputs: ask for one until the disk has caught up."""
    for _ in range(200):
        llm.generate("a", SamplingParams(max_tokens=1))
        if llm.stats.num_disk_written_blocks_total + llm.stats.num_disk_failed_writes_total >= num_blocks:
            return
        time.sleep(0.02)
    raise AssertionError("the disk has not caught up")


def test_a_restart_finds_what_was_computed_and_damage_is_a_miss(default_model_path: Path, tmp_path: Path) -> None:
    prompts = make_prompts(3, 10 * BLOCK + 3)
    settings: dict[str, Any] = {"max_model_len": 512, "disk_kv_cache_dir": str(tmp_path)}
    with LLM(str(default_model_path), **settings) as llm:
        expected, cached = generate(llm, prompts, SHORT)
        assert cached == [0, 0, 0]
        wait_until_written(llm, 30)
    with LLM(str(default_model_path), **settings) as llm:
        assert generate(llm, prompts, SHORT) == (expected, [10 * BLOCK] * 3)
        assert llm.stats.num_disk_hit_tokens_total == 30 * BLOCK
    rng = random.Random(5)
    for path in tmp_path.rglob("*.kv"):
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    with LLM(str(default_model_path), **settings) as llm:
        assert generate(llm, prompts, SHORT) == (expected, [0, 0, 0])
        assert llm.stats.num_disk_failed_reads_total > 0
        wait_until_written(llm, 30)
    # Written by other kernels: another identity, so nobody's blocks are mistaken for one's own.
    with LLM(str(default_model_path), activation_dtype="float32", **settings) as llm:
        assert generate(llm, prompts, SHORT)[1] == [0, 0, 0]


def test_a_disk_without_room_costs_nothing_but_the_cache(default_model_path: Path, tmp_path: Path) -> None:
    prompts = make_prompts(2, 10 * BLOCK + 3)
    settings: dict[str, Any] = {"max_model_len": 512, "disk_kv_cache_dir": str(tmp_path)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with LLM(str(default_model_path), max_model_len=512) as llm:
        expected, _ = generate(llm, prompts, SHORT)
    with LLM(str(default_model_path), **settings) as llm:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            assert generate(llm, prompts, SHORT)[0] == expected
            wait_until_written(llm, 20)
            assert llm.stats.num_disk_written_blocks_total == 0
            assert generate(llm, prompts, SHORT)[0] == expected
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not block_files(tmp_path)


def block_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def has_no_other_engine(server: Server, engine: psutil.Process) -> bool:
    """Until the server has noticed the end of `engine` and started another one."""
    with contextlib.suppress(psutil.Error):  # one that has just ended
        return not [process for process in server.engine_processes() if process.pid != engine.pid]
    return True


async def test_killed_while_writing_and_started_again(default_model_path: Path, tmp_path: Path) -> None:
    """kill -9 of the engine's process, at any moment: the next one reports cached tokens and gives the same text."""
    prompts = make_prompts(4, 400)
    flags = ("--disk-kv-cache-dir", str(tmp_path), "--max-model-len", "1024")
    expected = []
    async with run_server(default_model_path, "--max-model-len", "1024") as server:
        for prompt in prompts:
            expected.append((await server.complete(prompt, max_tokens=4))["choices"][0]["text"])

    async def ask(index: int) -> int:
        answer = await server.complete(prompts[index], max_tokens=4)
        assert answer["choices"][0]["text"] == expected[index]
        cached: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return cached

    async with run_server(default_model_path, *flags) as server:
        for round in range(3):
            asking = asyncio.gather(*map(ask, range(4)), return_exceptions=True)
            while len(block_files(tmp_path)) <= 20 * round:
                await asyncio.sleep(0.002)
            (engine,) = server.engine_processes()
            engine.kill()
            failures = [answer for answer in await asking if not isinstance(answer, int)]
            assert all(isinstance(failure, (AssertionError, aiohttp.ClientError)) for failure in failures)
            while await has_no_other_engine(server, engine):
                await asyncio.sleep(0.02)
            await server.wait_ready()
        assert sum([await ask(index) for index in range(4)]) > 0
    async with run_server(default_model_path, *flags) as server:
        assert sum([await ask(index) for index in range(4)]) > 0
        assert await server.gauge("pelton:kv_disk_hit_tokens_total") > 0
        assert await server.gauge("pelton:kv_disk_failed_reads_total") == 0
    assert not [path for path in block_files(tmp_path) if path.suffix == ".tmp"]
