"""The step profile on tiny models: every op of a step is there, and the parts add up."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from pelton.bench.step_profile import StepPart, StepProfile, StepProfilePlan, median_step
from pelton.core.errors import ConfigError
from pelton.weights.config import ModelConfig
from pelton.weights.model_files import open_model
from pelton.worker.config import WorkerConfig
from pelton.worker.executors.step_profile import profile_steps
from tests.weights.make_models import TINY_CONFIGS, random_tensors, write_gguf

PLAN = StepProfilePlan(decode=(1, 5), prefill=(40,), context=20, budget_s=0.01)
TEXT = range(5, 35)  # shorter than a prompt


def profile(folder: Path, name: str, quantized: gguf.GGMLQuantizationType) -> list[StepProfile]:
    config = TINY_CONFIGS[name]
    path = write_gguf(folder / "tiny.gguf", config, random_tensors(config), quantized=quantized)
    configs = ModelConfig(model=str(path)), WorkerConfig(threads=2, enable_weight_cache=False)
    kernels, profiles = profile_steps(open_model(path), configs, PLAN, TEXT, "portable", lambda _: None)
    assert kernels == "native (portable)"
    return profiles


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_parts_are_all_of_a_step(tmp_path: Path, name: str) -> None:
    profiles = profile(tmp_path, name, gguf.GGMLQuantizationType.Q8_0)
    assert [(p.name, p.num_requests, p.num_tokens) for p in profiles] == [
        ("decode after 20 tokens", 1, 1),
        ("decode after 20 tokens", 5, 5),
        ("prefill", 1, 40),
    ]
    for each in profiles:
        assert each.num_steps >= 3
        assert each.fastest_s <= each.time_s
        assert sum(part.time_s for part in each.parts) == pytest.approx(each.time_s)
        calls = {part.name: part.num_calls for part in each.parts}
        assert calls["gated_mlp 64 -> 96 -> 64"] == calls["attend"] == calls["rotate_and_store"] == 3
        assert calls["logits, greatest only"] == calls["embedding"] == 1  # the head
        assert list(each.parts) == sorted(each.parts, key=lambda part: -part.time_s)


def test_dense_layers_are_named_alike(tmp_path: Path) -> None:
    calls = {part.name: part.num_calls for part in profile(tmp_path, "llama", gguf.GGMLQuantizationType.F32)[0].parts}
    assert calls["gated_mlp 64 -> 96 -> 64"] == calls["linear 64 -> 64"] == 3


def test_the_median_step_of_those_after_the_first() -> None:
    steps = [(time_s, (StepPart(name=f"{time_s}", num_calls=1, time_s=time_s),)) for time_s in (9.0, 3.0, 1.0, 2.0)]
    found = median_step("decode", (4, 4), steps)
    assert (found.time_s, found.fastest_s, found.num_steps) == (2.0, 1.0, 3)
    assert found.parts[0].name == "2.0"


def test_sizes_must_be_positive() -> None:
    with pytest.raises(ConfigError):
        StepProfilePlan(decode=(1, 0))
