"""The greatest logit of every row, found while they are made, against logits that are written out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from pelton.core.sampling_params import SamplingParams
from pelton.core.thinking import ThinkingBudget
from pelton.weights.channel_quantization import round_channels
from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.cpu import pelton_cpu
from pelton.worker.kernels.cpu.arrays import Floats, address
from tests.worker.native import DENSE_FORMATS, ISAS, PACKED_FORMATS, native, random_packed

pytestmark = pytest.mark.torch

NUM_INPUTS = 512


def greatest(isa: str, weight: pelton_cpu.LinearWeight, x: Floats, bias: Floats, num_threads: int) -> list[int]:
    runtime = native(isa, num_threads).runtime
    return runtime.greatest_columns(weight, address(x), len(x), address(bias))


def load(isa: str, tensors: Sequence[WeightTensor]) -> pelton_cpu.LinearWeight:
    return native(isa).make_linear_loader().load(tensors)


def make_tensors(name: str) -> list[WeightTensor]:
    if name in ("w8a8", "w4a8"):
        return [round_channels(random_packed("F32", size, NUM_INPUTS, seed=size), name) for size in (2050, 33)]
    return [random_packed(name, size, NUM_INPUTS, seed=size) for size in (2050, 33)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", [*PACKED_FORMATS, *DENSE_FORMATS, "w8a8", "w4a8"])
def test_it_is_the_first_greatest(isa: str, name: str) -> None:
    """Of two matrices side by side, in pieces and by several threads."""
    rng = np.random.default_rng(0)
    weight = load(isa, make_tensors(name))
    bias = rng.standard_normal(weight.num_outputs, dtype=np.float32)
    for num_rows in (0, 1, 2, 17, 64, 300):
        x = rng.standard_normal((num_rows, NUM_INPUTS), dtype=np.float32)
        x[1:2] = 0.0  # its greatest is the bias's
        x[2:3, 7] = 400.0  # an outlier, whose code is longer in formats by channel
        expected = native(isa).linear(x, weight, bias).argmax(axis=1).tolist()
        for num_threads in (1, 3):
            assert greatest(isa, weight, x, bias, num_threads) == expected, num_rows


@pytest.mark.parametrize("isa", ISAS)
def test_of_equal_ones_it_is_the_first(isa: str) -> None:
    """Equal outputs in every panel and in both matrices; -0.0 equals 0.0."""
    values = np.zeros((5000, 64), dtype=np.float32)
    tensor = WeightTensor("w", values.shape, "F32", values.reshape(-1).view(np.uint8))
    weight = load(isa, [tensor, tensor])
    x = np.ones((9, 64), dtype=np.float32)
    for value in (0.0, 3.0, -3.0):
        for first in (0, 31, 4999, 5000, 7777):
            bias = np.full(10_000, value - 1, dtype=np.float32)
            bias[first:] = value
            bias[first + 1 :: 2] = -value if value == 0.0 else value
            assert greatest(isa, weight, x, bias, 3) == [first] * 9


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["Q8_0", "F32", "w8a8"])
def test_rows_that_are_not_finite_have_none(isa: str, name: str) -> None:
    weight = load(isa, make_tensors(name))
    bias = np.zeros(weight.num_outputs, dtype=np.float32)
    x = np.random.default_rng(0).standard_normal((6, NUM_INPUTS), dtype=np.float32)
    x[1, 3], x[4, 0] = math.nan, math.inf
    found = greatest(isa, weight, x, bias, 2)
    assert [found[i] for i in (1, 4)] == [pelton_cpu.NO_COLUMN] * 2
    clean = [0, 2, 3, 5]
    expected = native(isa).linear(x, weight, bias)[clean].argmax(axis=1).tolist()
    assert [found[i] for i in clean] == expected
    bias[11] = math.nan
    assert greatest(isa, weight, x, bias, 2) == [pelton_cpu.NO_COLUMN] * 6


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.5},
        {"logprobs": 0},
        {"logit_bias": {1: 1.0}},
        {"allowed_token_ids": (1, 2)},
        {"banned_token_ids": (1,)},
        {"banned_sequences": ((1, 2),)},
        {"min_tokens": 1},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"thinking": ThinkingBudget(max_tokens=1, end_token_ids=(2,), forced_token_ids=(2,))},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_who_wants_more_than_the_greatest(changes: dict[str, object]) -> None:
    assert SamplingParams(temperature=0.0, top_k=5, top_p=0.9, min_p=0.1, stop=("x",)).takes_greatest
    assert not SamplingParams(**{"temperature": 0.0, **changes}).takes_greatest  # type: ignore[arg-type]
