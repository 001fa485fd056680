"""Law 3 on the real model: a request's greedy tokens do not depend on load, chunks, cache or preemption."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pelton import LLM, SamplingParams

pytestmark = pytest.mark.model

NUM_STREAMS = 64
TEXT = (
    "A scheduler decides which tokens are computed next. The cache keeps what was computed before. "
    "def add(a, b):\n    return a + b\n\nЧисла: 1, 2, 3. 数据 = [4, 5, 6] 🙂 SELECT * FROM requests WHERE id = 7; "
)


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """Mixed lengths, 3 to 120 tokens; one in four starts alike."""
    rng = random.Random(7)
    texts = []
    for index in range(NUM_STREAMS):
        start = 0 if index % 4 == 0 else rng.randrange(len(TEXT))
        texts.append((TEXT * 3)[start : start + rng.choice([8, 40, 90, 160, 300])] + f" {index}:")
    return texts


@pytest.fixture(scope="module")
def samplings() -> list[SamplingParams]:
    rng = random.Random(8)
    return [SamplingParams(temperature=0, max_tokens=rng.randint(6, 16), ignore_eos=True) for _ in range(NUM_STREAMS)]


@pytest.fixture(scope="module")
def alone(
    default_model_path: Path, prompts: list[str], samplings: list[SamplingParams]
) -> Callable[[str, int], list[list[int]]]:
    """By way to compute and block size, which may choose a kernel (tiles take blocks of 16 and more): each request
    by itself, its prompt in one piece, nothing cached."""

    @cache
    def generate(backend: str, block_size: int) -> list[list[int]]:
        settings = {"max_model_len": 512, "max_num_batched_tokens": 512, "enable_prefix_caching": False}
        with LLM(str(default_model_path), block_size=block_size, **BACKENDS[backend], **settings) as llm:
            return [
                llm.generate(prompt, sampling)[0].sequences[0].token_ids
                for prompt, sampling in zip(*_streams(backend, prompts, samplings), strict=True)
            ]

    return generate


def _streams(
    backend: str, prompts: list[str], samplings: list[SamplingParams]
) -> tuple[list[str], list[SamplingParams]]:
    count = NUM_REFERENCE_STREAMS if backend == "reference" else NUM_STREAMS
    return prompts[:count], samplings[:count]


BACKENDS: dict[str, dict[str, Any]] = {
    "native": {"kernel_backend": "native"},
    "w4a8": {"kernel_backend": "native", "quantization": "w4a8"},
    "reference": {"kernel_backend": "reference"},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "chunk-16": {"long_prefill_chunk": 16},
    "chunk-64-no-cache": {"long_prefill_chunk": 64, "enable_prefix_caching": False},
    "chunk-512": {"max_num_batched_tokens": 512, "enable_overlap": False},
    "no-chunks-no-cache": {"max_num_batched_tokens": 8192, "enable_prefix_caching": False},
    # 520 slots, a few requests at a time, and blocks so small that each outgrows its last one several times.
    "preempted": {"num_kv_blocks": 131, "block_size": 4, "enable_prefix_caching": False},
    "one-thread": {"threads": 1},
}


# The reference kernels are slow: fewer streams, and the settings that differ most.
CASES = [("native", name) for name in SETTINGS]
CASES += [(backend, name) for backend in ("w4a8", "reference") for name in ("no-chunks-no-cache", "preempted")]
NUM_REFERENCE_STREAMS = 12


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_together_as_alone(
    default_model_path: Path,
    backend: str,
    prompts: list[str],
    samplings: list[SamplingParams],
    alone: Callable[[str, int], list[list[int]]],
    name: str,
) -> None:
    settings = {"max_model_len": 512, "max_num_seqs": 64} | BACKENDS[backend] | SETTINGS[name]
    prompts, samplings = _streams(backend, prompts, samplings)
    # Torch's kernels know no block size: with another one they have to give the same.
    expected = alone(backend, 16 if backend == "reference" else settings.get("block_size", 16))
    with LLM(str(default_model_path), **settings) as llm:
        together = [answer.sequences[0].token_ids for answer in llm.generate(prompts, samplings)]
        assert llm.stats.num_blocks_used == 0
        if name == "preempted":
            assert llm.stats.num_preemptions_total > 0
        assert together == expected
        if settings.get("enable_prefix_caching", True):
            again = llm.generate(prompts, samplings)
            assert [answer.sequences[0].token_ids for answer in again] == expected
            assert sum(answer.num_cached_tokens for answer in again) > 0
