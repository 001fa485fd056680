"""Products with one scale per output and one per row, on every instruction set that runs here."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from pelton.weights.channel_quantization import round_channels
from pelton.weights.dequantize import dequantize
from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.cpu import pelton_cpu
from pelton.worker.kernels.cpu.backend import NativeKernels
from tests.worker.native import ISAS, native, random_packed

pytestmark = pytest.mark.torch

F32 = npt.NDArray[np.float32]


QUANTIZATIONS = ("w8a8", "w4a8")


def channel_tensor(quantization: str, num_outputs: int, num_inputs: int, seed: int = 0) -> WeightTensor:
    """Codes of every size; rows differ in scale by orders of magnitude."""
    values = np.random.default_rng(seed).standard_normal((num_outputs, num_inputs), dtype=np.float32)
    values *= np.logspace(-3, 1, num_outputs, dtype=np.float32)[:, None]
    return round_channels(WeightTensor("w", values.shape, "F32", values.reshape(-1).view(np.uint8)), quantization)


def some_rows(num_rows: int, num_inputs: int, seed: int = 1) -> F32:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_rows, num_inputs), dtype=np.float32)
    return (x * np.logspace(-3, 3, num_rows, dtype=np.float32)[:, None]).astype(np.float32)


def round_up(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """To four bits behind the first one."""
    mantissas, exponents = np.frexp(values)
    return np.ldexp(np.ceil(mantissas * 32) / 32, exponents)


def rounded_rows(x: F32) -> npt.NDArray[np.float64]:
    """As the kernels should: in 8 bits, but for values beyond ten times the root mean square of the others, whose codes
    are longer, of up to 16 bits."""
    sizes = np.abs(x).astype(np.float64)
    largest = sizes.max(axis=1, keepdims=True)
    limit = round_up(10 * np.sqrt(np.square(sizes).mean(axis=1, keepdims=True)))
    others = np.where(sizes <= limit, sizes, 0)
    narrow = np.maximum(round_up(10 * np.sqrt(np.square(others).mean(axis=1, keepdims=True))), largest / 256)
    limit = np.minimum(np.where(largest > 2 * limit, narrow, limit), largest)
    too_small = np.square(sizes).sum(axis=1, keepdims=True) < 2.0**-80  # to be summed up in float32
    limit = np.where(too_small, largest, limit).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(limit > 0, np.rint(x * (np.float32(127) / limit)), 0)
    return codes.astype(np.float64) * (limit / np.float32(127)).astype(np.float64)


def expected_products(x: F32, tensor: WeightTensor, bias: F32 | None = None) -> npt.NDArray[np.float64]:
    products = rounded_rows(x) @ dequantize(tensor).astype(np.float64).T
    return products if bias is None else products + bias


def assert_near(result: F32, expected: npt.NDArray[np.float64], x: F32, tensor: WeightTensor) -> None:
    sizes = np.abs(x).astype(np.float64) @ np.abs(dequantize(tensor)).astype(np.float64).T
    assert result.shape == expected.shape
    assert (np.abs(result - expected) <= 3e-7 * (sizes + np.abs(expected)) + 1e-30).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(
    ("num_outputs", "num_inputs"), [(1, 32), (31, 64), (33, 96), (100, 512), (64, 1056), (40, 4864)]
)
def test_products_are_exact_but_for_the_last_rounding(
    quantization: str, isa: str, num_outputs: int, num_inputs: int
) -> None:
    kernels = native(isa)
    tensor = channel_tensor(quantization, num_outputs, num_inputs)
    weight = kernels.make_linear_loader().load([tensor])
    bias = np.random.default_rng(2).standard_normal(num_outputs, dtype=np.float32)
    for num_rows in (0, 1, 2, 6, 7, 16, 17, 32, 33, 48, 65, 130):
        x = some_rows(num_rows, num_inputs)
        assert_near(kernels.linear(x, weight), expected_products(x, tensor), x, tensor)
        assert_near(kernels.linear(x, weight, bias), expected_products(x, tensor, bias), x, tensor)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("num_inputs", [544, 4864])
def test_rows_do_not_depend_on_their_company(quantization: str, isa: str, num_inputs: int) -> None:
    """Law 3: alone, in any batch, at any place, by any number of threads; 4,864 inputs take several passes."""
    tensors = [channel_tensor(quantization, 70, num_inputs), channel_tensor(quantization, 33, num_inputs, seed=5)]
    x = some_rows(600, num_inputs)
    bias = np.random.default_rng(2).standard_normal(103, dtype=np.float32)
    kernels = native(isa)
    weight = kernels.make_linear_loader().load(tensors)
    expected = kernels.linear(x, weight, bias)
    for num_rows in range(1, 41):
        first = 13 * num_rows
        np.testing.assert_array_equal(
            kernels.linear(x[first : first + num_rows], weight, bias), expected[first:][:num_rows]
        )
    order = np.random.default_rng(3).permutation(600)
    np.testing.assert_array_equal(kernels.linear(x[order], weight, bias), expected[order])
    threaded = native(isa, 3)
    np.testing.assert_array_equal(threaded.linear(x, weight, bias), expected)
    repacked = threaded.make_linear_loader().load(tensors)
    np.testing.assert_array_equal(threaded.linear(x[:9], repacked, bias), expected[:9])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_outliers_leave_the_others_their_bits(quantization: str, isa: str) -> None:
    """One value a thousand times the others: in 8 bits alone, these would all be zeros."""
    kernels = native(isa, 2)
    tensor = channel_tensor(quantization, 70, 4864)
    weight = kernels.make_linear_loader().load([tensor])
    bias = np.random.default_rng(2).standard_normal(70, dtype=np.float32)
    x = np.random.default_rng(6).standard_normal((300, 4864), dtype=np.float32)
    x[::3, 17] = 1000.0
    result = kernels.linear(x, weight, bias)
    exact = x.astype(np.float64) @ dequantize(tensor).astype(np.float64).T + bias
    sizes = np.abs(x).astype(np.float64) @ np.abs(dequantize(tensor)).astype(np.float64).T
    assert (np.abs(result - exact)[::3] <= 3e-3 * sizes[::3]).all()
    for first, num_rows in ((0, 1), (3, 2), (1, 2), (9, 17), (30, 40), (6, 250)):
        np.testing.assert_array_equal(
            kernels.linear(x[first : first + num_rows], weight, bias), result[first:][:num_rows]
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("num_inputs", [32, 896, 4864])
def test_outliers_of_every_size_and_number(quantization: str, isa: str, num_inputs: int) -> None:
    kernels = native(isa)
    tensor = channel_tensor(quantization, 40, num_inputs)
    weight = kernels.make_linear_loader().load([tensor])
    rng = np.random.default_rng(7)
    x = rng.standard_normal((48, num_inputs), dtype=np.float32)
    for row, values in enumerate(x):
        count = min(num_inputs, (1, 2, 7, num_inputs // 101, num_inputs // 50, num_inputs // 2)[row % 6])
        at = rng.choice(num_inputs, count, replace=False)  # several of the same four inputs among them
        values[at] = rng.choice([-1, 1], count) * np.float32(10.0 ** rng.uniform(1, 1 + row / 8, count))
    x[40] = 0.0
    x[40, 3] = 7.0  # an outlier among zeros
    x[41] = 0.0
    x[42] = rng.standard_normal(num_inputs, dtype=np.float32) * np.float32(1e-16)
    x[42, 3] = 1e-14  # an outlier, but for squares that are too small to be summed up
    for num_rows in (1, 2, 13, 48):
        for first in range(0, 48, num_rows):
            some = x[first : first + num_rows]
            assert_near(kernels.linear(some, weight), expected_products(some, tensor), some, tensor)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_instruction_sets_agree(quantization: str) -> None:
    tensor, x = channel_tensor(quantization, 40, 512), some_rows(50, 512)
    results = [native(isa).linear(x, native(isa).make_linear_loader().load([tensor])) for isa in ISAS]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=3e-7, atol=1e-30)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("num_rows", [1, 9, 40])
def test_extreme_values_stay_in_their_row(quantization: str, isa: str, num_rows: int) -> None:
    kernels = native(isa)
    tensor = channel_tensor(quantization, 33, 256)
    weight = kernels.make_linear_loader().load([tensor])
    plain = np.random.default_rng(0).standard_normal((num_rows, 256), dtype=np.float32)
    expected = kernels.linear(plain, weight)
    position = num_rows // 2
    others = [i for i in range(num_rows) if i != position]
    for name, at, value in (("nan", 40, math.nan), ("inf", 200, -math.inf), ("huge", 3, 1e37), ("zeros", None, 0.0)):
        x = plain.copy()
        x[position, slice(None) if at is None else at] = value
        result = kernels.linear(x, weight)
        np.testing.assert_array_equal(result[others], expected[others], name)
        assert np.isfinite(result[position]).all() == (name in ("huge", "zeros")), name
        if name == "zeros":
            assert not result[position].any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("gelu", [False, True])
def test_gated_layer(quantization: str, isa: str, gelu: bool) -> None:
    """Of one op, beside its parts: what lies between may be rounded to bfloat16 there. And a row alone is the same."""
    kernels = native(isa, 2)
    sides = [channel_tensor(quantization, 192, 96, seed=seed) for seed in (1, 2)]
    wide = kernels.make_linear_loader().load(sides)
    narrow_tensor = channel_tensor(quantization, 96, 192, seed=3)
    narrow = kernels.make_linear_loader().load([narrow_tensor])
    x = np.random.default_rng(4).standard_normal((600, 96), dtype=np.float32)

    def fused(rows: F32) -> F32:
        program = pelton_cpu.Program(kernels.runtime, [], 0)
        out, into = program.add_slot(96), program.add_slot(96)
        program.select_rows(96, (into, 0))
        program.gated_mlp(gelu, wide, 0, narrow, 0, (-1, -1), (into, 0), (out, 0))
        result = np.empty_like(rows)
        program.run_rows(rows, np.arange(len(rows)), result)
        return result

    expected = expected_products(
        (kernels.gelu_tanh_mul if gelu else kernels.silu_mul)(kernels.linear(x, wide)), narrow_tensor
    )
    result = fused(x)
    assert np.abs(result - expected).max() <= 0.02 * np.abs(expected).max()
    for num_rows in (1, 5, 16, 33, 70, 257):  # from 256 on two threads share rows, below outputs
        np.testing.assert_array_equal(fused(x[:num_rows].copy()), result[:num_rows])


@pytest.mark.parametrize(("quantization", "grouped"), [("w8a8", "INT8"), ("w4a8", "INT4")])
def test_stands_beside_no_other_kind_of_format(quantization: str, grouped: str) -> None:
    kernels = NativeKernels(1)
    tensors = [channel_tensor(quantization, 5, 64), random_packed("Q8_0", 5, 64)]
    weight = kernels.make_linear_loader().load(tensors)  # both in groups then
    assert weight.num_bytes == sum(pelton_cpu.packed_num_bytes(name, 5, 64) for name in (grouped, "Q8_0"))
    weight = pelton_cpu.LinearWeight(64)
    kernels.packed_weights.add_to(weight, tensors[0])
    with pytest.raises(ValueError, match="no other kind"):
        kernels.packed_weights.add_to(weight, tensors[1])
