"""The engine over the backend, end to end: the reference's tokens, whether they are late or waited for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from pelton.build import join_engine
from pelton.core.model_spec import ModelSpec, RopeSpec, make_kv_groups
from pelton.core.protocols import MonotonicClock
from pelton.engine.config import EngineConfig
from pelton.weights.config import ModelConfig
from pelton.worker.config import WorkerConfig
from pelton.worker.executors.build_worker import build_executor
from pelton.worker.kernels.triton.sampling import DeviceSampler
from tests.make import EOS_TOKEN_ID, VOCAB_SIZE, ByteDecoder, generate, make_submission

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:overflow encountered")]

SPEC = ModelSpec(
    architecture="llama",
    num_layers=2,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=VOCAB_SIZE,
    max_model_len=128,
    rms_norm_eps=1e-6,
    rope=RopeSpec(theta=1e4, rotary_dim=16),
    kv_groups=make_kv_groups([None, None]),
)
ENGINE = EngineConfig(num_kv_blocks=40, block_size=4, max_num_seqs=4, max_num_batched_tokens=12, host_kv_cache_gb=1e-4)


@dataclass
class SpecOnly:
    path: str = "dummy"
    spec: ModelSpec = SPEC


def token_ids(backend: str, **settings: str) -> dict[tuple[str, int], list[int]]:
    config = WorkerConfig(kernel_backend=backend, threads=1, **settings)
    executor, info = build_executor(
        SpecOnly(), ModelConfig(load_format="dummy"), config, ENGINE, eos_token_ids={EOS_TOKEN_ID}
    )
    assert info.device == "cpu"
    engine = join_engine(ENGINE, executor, info, ByteDecoder(), MonotonicClock(), SPEC.kv_groups)
    prompts = [[5, 6, 7, 8, 9], list(range(40, 57)), [200] * 3]
    try:
        return generate(
            engine,
            make_submission(prompts[0], "greedy", max_tokens=7, ignore_eos=True),
            make_submission(prompts[1], "drawn", max_tokens=5, ignore_eos=True, temperature=0.9, top_p=0.8, seed=3),
            # Its penalty needs each token before the next: from here on steps are waited for.
            make_submission(prompts[2], "penalty", max_tokens=2, ignore_eos=True, presence_penalty=0.5),
        )
    finally:
        executor.close()


def test_the_engine_gives_the_references_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[bool] = []
    try_sample_late = DeviceSampler.try_sample_late

    def counted(*args: object) -> object:
        samples = try_sample_late(*args)  # type: ignore[arg-type]
        late.append(samples is not None)
        return samples

    monkeypatch.setattr(DeviceSampler, "try_sample_late", counted)
    num_threads = torch.get_num_threads()
    try:
        found, expected = token_ids("triton"), token_ids("reference", kv_cache_dtype="float32")
    finally:
        torch.set_num_threads(num_threads)
    assert found == expected
    assert {name: len(tokens) for (name, _), tokens in found.items()} == {"greedy": 7, "drawn": 5, "penalty": 2}
    assert late.count(True) >= 3
    assert late.count(False) >= 1
