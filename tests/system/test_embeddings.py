"""Real models over HTTP, through the official client: embeddings against the hidden states of `transformers`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import openai
import pytest
import torch

from pelton.weights.catalog import resolve_model
from pelton.weights.config import ModelConfig
from pelton.weights.model_files import open_model
from pelton.weights.tokenizer import load_tokenizer
from tests.system.server import run_server
from tests.worker.test_models_real import TEXTS, reference_model

pytestmark = [pytest.mark.torch, pytest.mark.model]

INPUTS = [TEXTS[1], "\n".join(TEXTS)]  # the second longer than two steps


@pytest.fixture(scope="module", params=["default", "gemma"])
def model_path(request: pytest.FixtureRequest) -> Path:
    if request.param == "default":
        path: Path = request.getfixturevalue("default_model_path")
        return path
    given = os.environ.get("PELTON_TEST_GEMMA")
    return Path(given) if given else resolve_model(ModelConfig(model="gemma-3-270m"))


@pytest.fixture(scope="module")
def hidden(model_path: Path) -> list[np.ndarray]:
    """[tokens, H] of each text, after the last norm."""
    tokenizer = load_tokenizer(model_path)
    model = reference_model(open_model(model_path))
    with torch.inference_mode():
        return [model.model(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0].numpy() for text in INPUTS]


EXPECTED = {"last": lambda states: states[-1], "mean": lambda states: states.mean(0), "cls": lambda states: states[0]}


async def test_embeddings_equal_transformers(model_path: Path, hidden: list[np.ndarray]) -> None:
    """In steps of 32 tokens, some of them from the cache."""
    flags = (
        "--max-num-batched-tokens",
        "32",
        "--max-num-seqs",
        "8",
        "--activation-dtype",
        "float32",
        "--kv-cache-dtype",
        "float32",
    )
    async with (
        run_server(model_path, *flags) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        model = (await client.models.list()).data[0].id
        found: dict[str, list[np.ndarray]] = {}
        for turn in range(2):
            for pooling, expected in EXPECTED.items():
                answer = await client.embeddings.create(model=model, input=INPUTS, extra_body={"pooling": pooling})
                vectors = [np.array(item.embedding, "f4") for item in answer.data]
                for vector, states in zip(vectors, hidden, strict=True):
                    wanted = expected(states) / np.linalg.norm(expected(states))
                    assert np.abs(vector - wanted).max() < 1e-4
                    assert vector @ wanted > 0.99999
                if turn:  # the same bits with a prefix cache that holds all of it
                    for vector, before in zip(vectors, found[pooling], strict=True):
                        assert np.array_equal(vector, before)
                found[pooling] = vectors
        assert answer.usage.prompt_tokens == sum(map(len, hidden))
        assert await server.gauge("vllm:prefix_cache_hits_total") > 0
