"""Pooled hidden states through the production engine: against `transformers`, and law 3."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pelton.build import PeltonConfig, build_engine
from pelton.core.errors import ContextLengthExceededError
from pelton.core.pooling import PoolingParams
from pelton.core.request import Submission
from pelton.core.sampling_params import SamplingParams
from pelton.engine.admission import check_submission
from pelton.engine.engine import Engine
from tests.make import ByteDecoder
from tests.worker.tiny_models import VOCAB_SIZE, make_tiny, save_tiny

pytestmark = pytest.mark.torch

ROWS = ("qwen2", "gemma3", "llama")
RAW = {method: PoolingParams(method=method, normalize=False) for method in ("last", "mean", "cls")}
LABELS = PoolingParams(method="labels", normalize=False, label_token_ids=(5, 17))


def prompt(seed: int, length: int = 90) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


def make_engine(folder: Path, **settings: Any) -> Engine:
    """Of few tokens a step, so that a prompt comes in several chunks."""
    values = {
        "model": str(folder),
        "max_model_len": 200,
        "max_num_batched_tokens": 32,
        "block_size": 8,
        "max_num_seqs": 16,
    }
    return build_engine(PeltonConfig.of(values | settings), ByteDecoder())  # type: ignore[arg-type]


def submit(
    engine: Engine, request_id: str, token_ids: list[int], pooling: PoolingParams | None, **options: Any
) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=options.pop("max_tokens", 1), pooling=pooling, **options)
    engine.submit(Submission(request_id=request_id, prompt_token_ids=token_ids, sampling=sampling))


def run(engine: Engine, *, preempt: bool = False) -> dict[str, np.ndarray]:
    """What was pooled, once nothing is left to do; the ledger balances after every step.

    `preempt`: each prompt that is computed in part loses its blocks once.
    """
    pooled: dict[str, np.ndarray] = {}
    while engine.has_work:
        for request in list(engine.scheduler.running) if preempt else ():
            if 0 < request.num_computed_tokens < request.num_prompt_tokens and not request.num_preemptions:
                engine.scheduler._preempt(request, request)
        engine.dispatch()
        engine.collect()
        engine.scheduler.kv.check(engine.scheduler.running)
        update = engine.take_update()
        for output in update.outputs if update is not None else ():
            assert output.error is None, output.error
            if output.pooled is not None:
                assert output.usage is not None
                assert output.usage.num_output_tokens == 0
                pooled[output.request_id] = np.frombuffer(output.pooled, "<f4")
    return pooled


def pool(engine: Engine, token_ids: list[int], params: Sequence[PoolingParams]) -> list[np.ndarray]:
    for index, one in enumerate(params):
        submit(engine, str(index), token_ids, one)
    pooled = run(engine)
    return [pooled[str(index)] for index in range(len(params))]


@pytest.fixture(scope="module", params=ROWS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, folder)
    return folder


EXACT: dict[str, dict[str, Any]] = {
    "native": {"activation_dtype": "float32", "kv_cache_dtype": "float32"},
    "reference": {},
}


@pytest.mark.parametrize("backend", EXACT)
def test_pooled_states_equal_transformers(folder: Path, backend: str) -> None:
    row = next(row for row in ROWS if folder.name.startswith(row))
    reference, tokens = make_tiny(row), prompt(0)
    with torch.inference_mode():
        hidden = reference.model(torch.tensor([tokens])).last_hidden_state[0]
        logits = reference(torch.tensor([tokens])).logits[0, -1]
    engine = make_engine(folder, kernel_backend=backend, **EXACT[backend])
    last, mean, cls, labels = pool(engine, tokens, [*RAW.values(), LABELS])
    for found, expected in ((last, hidden[-1]), (mean, hidden.mean(0)), (cls, hidden[0]), (labels, logits[[5, 17]])):
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=2e-4)
    assert np.abs(mean - last).max() > 0.01
    cut = pool(engine, tokens, [PoolingParams(method="last", dimensions=7)])[0]
    np.testing.assert_allclose(cut, last[:7] / np.linalg.norm(last[:7]), rtol=1e-5)
    engine.executor.close()


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 128}, {"num_kv_blocks": 12}])
def test_a_prompt_as_long_as_the_context(folder: Path, settings: dict[str, Any]) -> None:
    engine = make_engine(folder, **{"max_model_len": 88} | settings)  # or what fits into the KV cache
    tokens, params = prompt(4, engine.info.max_model_len), [*RAW.values(), LABELS]
    roomy = make_engine(folder)
    expected = pool(roomy, tokens, params)
    roomy.executor.close()
    for _ in range(2):  # the second time there is a cached prefix
        for found, wanted in zip(pool(engine, tokens, params), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
    engine.executor.close()
    for token_ids, pooling, told in (
        ([*tokens, 1], RAW["last"], rf"holds {len(tokens)}$"),
        (tokens, None, r"one output token$"),
    ):
        sampling = SamplingParams(max_tokens=1, pooling=pooling)
        with pytest.raises(ContextLengthExceededError, match=told):
            check_submission(Submission(request_id="a", prompt_token_ids=token_ids, sampling=sampling), engine.info)


def test_law_3_for_pooling(folder: Path) -> None:
    """Alone and whole, in chunks, beside others, from the cache and after preemptions: the same bits."""
    params = [*RAW.values(), LABELS]
    alone = make_engine(folder, max_num_batched_tokens=200, enable_prefix_caching=False)
    expected = {seed: pool(alone, prompt(seed), params) for seed in range(3)}
    alone.executor.close()
    for settings in (
        {"max_num_batched_tokens": 16},
        {"max_num_batched_tokens": 37},
        {"max_num_batched_tokens": 64, "preempt": True},
    ):
        preempt = bool(settings.pop("preempt", False))
        engine = make_engine(folder, **settings)
        for turn in range(2):  # the second time there are cached prefixes
            for seed in expected:
                for index, one in enumerate(params):
                    submit(engine, f"{seed}-{index}", prompt(seed), one)
                submit(engine, f"text-{seed}", prompt(seed, 40), None, max_tokens=25, ignore_eos=True)
            pooled = run(engine, preempt=preempt)
            for seed, values in expected.items():
                for index, value in enumerate(values):
                    assert np.array_equal(pooled[f"{seed}-{index}"], value), (settings, turn, seed, index)
        assert engine.stats().num_prefix_hits_total > 0
        assert (engine.stats().num_preemptions_total > 3) == preempt
        engine.executor.close()


def test_dimensions_beyond_the_models_are_refused(folder: Path) -> None:
    engine = make_engine(folder)
    submit(engine, "a", [1, 2], PoolingParams(dimensions=10_000))
    update = engine.take_update()
    assert update is not None
    assert update.outputs[0].error is not None
    assert update.outputs[0].error.param == "dimensions"
    engine.executor.close()
