"""Shapes by name: what they come to, and that they have no weights to give."""

from __future__ import annotations

import math

import pytest

from pelton.core.errors import ModelFileError
from pelton.weights.architectures import expected_tensors
from pelton.weights.catalog import resolve_model
from pelton.weights.config import ModelConfig
from pelton.weights.model_files import open_model
from pelton.weights.presets import preset_names

# Parameters in billions, as published; of the 70B's 80 layers 16.
SIZES = {"llama-3.1-8b": 8.03, "qwen3-8b": 8.19, "qwen3-30b-a3b": 30.53, "llama-3.1-70b-16-layers": 15.79}


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_has_the_published_size_and_no_weights(name: str) -> None:
    files = open_model(resolve_model(ModelConfig(model=name, load_format="dummy")))
    num_parameters = sum(math.prod(shape) for shape in expected_tensors(files.spec).values())
    assert num_parameters / 1e9 == pytest.approx(SIZES[name], abs=0.01)
    with pytest.raises(ModelFileError, match="a shape without weights"):
        files.tensor("lm_head.weight")
