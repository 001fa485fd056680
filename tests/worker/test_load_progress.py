"""Lines in the log while weights are loaded: one a second at most, none for a short start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from pelton.build import PeltonConfig, build_engine_from_settings
from pelton.weights.tensors import WeightTensor
from pelton.worker import load_progress
from pelton.worker.load_progress import LoadProgress
from tests.weights.make_tokenizers import train_byte_level
from tests.worker.tiny_models import save_tiny


def tensor_of(num_bytes: int) -> WeightTensor:
    return WeightTensor("w", (num_bytes,), "Q8_0", np.zeros(num_bytes, np.uint8))


@pytest.mark.parametrize(
    ("times_s", "expected"),
    [
        ([0.1, 0.5, 0.9, 0.99], []),
        ([0.1, 0.5, 1.0, 1.9], [0.5]),
        ([0.1, 1.5, 2.4, 2.6], [0.25, 0.75]),
        ([5.0, 5.1, 9.0, 9.1], [0.0, 0.5]),
    ],
)
def test_a_report_a_second_at_most(times_s: list[float], expected: list[float]) -> None:
    reports: list[float] = []
    clock = iter([0.0, *times_s])
    progress = LoadProgress(400, lambda tensor: tensor.data.nbytes, reports.append, lambda: next(clock))
    for _ in times_s:
        tensor = tensor_of(100)
        assert progress.pass_on(tensor) is tensor
    assert reports == expected


def test_never_more_than_all() -> None:
    """An embedding that is the output, too, is asked for twice."""
    reports: list[float] = []
    clock = iter([0.0, 0.1, 0.2, 2.0])
    progress = LoadProgress(100, lambda tensor: tensor.data.nbytes, reports.append, lambda: next(clock))
    for _ in range(3):
        progress.pass_on(tensor_of(100))
    assert reports == [1.0]


@pytest.mark.torch
@pytest.mark.parametrize("quantization", [None, "w4a8"])
@pytest.mark.parametrize("log_level", ["info", "warning"])
def test_a_slow_start_is_heard_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    log_level: str,
    quantization: str | None,
) -> None:
    """In lines as the server's; with an interval of none, as every tensor is asked for."""
    save_tiny("qwen2-tied", tmp_path / "model")
    train_byte_level().save(str(tmp_path / "model" / "tokenizer.json"))
    settings: dict[str, Any] = {"model": str(tmp_path / "model"), "num_kv_blocks": 60, "quantization": quantization}
    settings |= {"threads": 1, "enable_weight_cache": False, "log_level": log_level}
    encoded = msgspec.json.encode(PeltonConfig.of(settings))
    build_engine_from_settings(encoded).executor.close()
    assert "loading weights" not in capfd.readouterr().err
    monkeypatch.setattr(load_progress, "INTERVAL_S", 0.0)
    build_engine_from_settings(encoded).executor.close()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if "loading weights" in line]
    assert all(line["level"] == "info" for line in lines)
    percents = [line["percent"] for line in lines]
    assert percents == sorted(percents)
    assert len(percents) > 5 if log_level == "info" else not percents
    assert not percents or (percents[0] == 0 and 50 < percents[-1] <= 100)
