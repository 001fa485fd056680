"""Packed weights times activations: every format on every instruction set that runs here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.cpu import pelton_cpu
from pelton.worker.kernels.cpu.backend import NativeKernels
from tests.worker.native import (
    DENSE_FORMATS,
    ISAS,
    PACKED_FORMATS,
    OnTensors,
    decoded,
    on_tensors,
    random_packed,
    uses_tiles,
)

pytestmark = pytest.mark.torch

GROUP = 32
TILE_FORMATS = [*PACKED_FORMATS, "BF16"]  # bfloat16 where there are tiles, 8 bits (BF16: float32) elsewhere


@pytest.fixture(params=ISAS)
def kernels(request: pytest.FixtureRequest) -> OnTensors:
    torch.manual_seed(0)
    return on_tensors(request.param)


def load(kernels: OnTensors, tensors: Sequence[WeightTensor]) -> Any:
    weight = kernels.make_linear_loader().load(tensors)
    assert isinstance(weight, pelton_cpu.LinearWeight)  # packed, not decoded
    return weight


def input_width(format_name: str) -> int:
    """The narrowest matrix of a format."""
    return 256 if format_name.endswith("K") else GROUP


def dense_kernels(isa: str, num_threads: int = 1) -> OnTensors:
    """Float32 products whatever the weights."""
    return on_tensors(isa, num_threads, "float32")


def assert_float_products(x: torch.Tensor, matrix: torch.Tensor, result: torch.Tensor) -> None:
    exact = x.double() @ matrix.T
    assert result.shape == exact.shape
    assert ((result.double() - exact).abs() <= 2e-6 * (x.double().abs() @ matrix.abs().T) + 1e-30).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format_name", PACKED_FORMATS + DENSE_FORMATS)
def test_float_products_see_the_very_weights(isa: str, format_name: str) -> None:
    """One input of 1 picks a column: bit for bit what weights/dequantize.py makes of it."""
    kernels = dense_kernels(isa)
    tensor = random_packed(format_name, 41, 256)
    result = kernels.linear(torch.eye(256), load(kernels, [tensor]))
    assert torch.equal(result.T, decoded([tensor]).float())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format_name", [*PACKED_FORMATS, *DENSE_FORMATS])
def test_float_products_do_not_depend_on_their_company(isa: str, format_name: str) -> None:
    torch.manual_seed(0)
    tensors = [random_packed(format_name, 70, 512), random_packed("Q8_0", 33, 512)]
    kernels = dense_kernels(isa)
    x, bias = torch.randn(600, 512) * torch.logspace(-3, 3, 600)[:, None], torch.randn(103)
    weight = load(kernels, tensors)
    expected = kernels.linear(x, weight, bias)
    assert_float_products(x[::7], decoded(tensors[:1]), kernels.linear(x, weight)[::7, :70])
    for num_rows in range(1, 41):
        first = 13 * num_rows
        part = kernels.linear(x[first : first + num_rows], weight, bias)
        assert torch.equal(part, expected[first : first + num_rows])
    threaded = dense_kernels(isa, 3)
    assert torch.equal(threaded.linear(x, weight, bias), expected)
    assert torch.equal(threaded.linear(x[:9], load(threaded, tensors), bias), expected[:9])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_inputs", [1, 2, 31, 33, 97])
@pytest.mark.parametrize("format_name", DENSE_FORMATS)
def test_dense_weights_may_have_any_width(isa: str, format_name: str, num_inputs: int) -> None:
    kernels = on_tensors(isa)
    tensor = random_packed(format_name, 35, num_inputs)
    weight, matrix = load(kernels, [tensor]), decoded([tensor])
    x = torch.randn(14, num_inputs)
    x[3, -1], x[5, 0] = math.nan, -math.inf
    result = kernels.linear(x, weight)
    clean = [i for i in range(14) if i not in (3, 5)]
    assert_float_products(x[clean], matrix, result[clean])
    assert not result[[3, 5]].isfinite().any()
    assert torch.equal(kernels.linear(x[6:7], weight), result[6:7])


def weight_error(kernels: OnTensors, matrix: torch.Tensor) -> torch.Tensor:
    """What unpacking may change of each weight [O, I]. Tiles: cut off to bfloat16, and 2^-9 of a code's step."""
    largest = matrix.abs().view(len(matrix), -1, GROUP).amax(-1, keepdim=True).expand(-1, -1, GROUP)
    largest = largest.reshape(matrix.shape)
    # float32 rounds the scaled code and the minimum: far less than a step from one code to the next.
    return 2**-7 * matrix.abs() + 2**-9 * largest if uses_tiles(kernels) else 4e-7 * largest


def assert_within_bound(
    kernels: OnTensors,
    x: torch.Tensor,
    matrix: torch.Tensor,
    result: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    """In 8 bits an activation is off by half a step (its group's largest / 127 / 2) at most, as bfloat16 by 2^-9."""
    wide = x.double()
    exact = wide @ matrix.T + (0 if bias is None else bias.double())
    # A format's minimum and its scaled codes may cancel: both are larger than the weight, by 32 times at most.
    bound = 2e-5 * (wide.abs() @ matrix.abs().T + exact.abs()) + 1e-30
    if uses_tiles(kernels):
        bound += wide.abs() @ (weight_error(kernels, matrix) + 2**-9 * matrix.abs()).T
    else:
        steps = wide.view(len(x), -1, GROUP).abs().amax(-1) / 127
        bound += 0.5 * steps @ matrix.abs().view(len(matrix), -1, GROUP).sum(-1).T
    assert result.shape == exact.shape
    assert ((result.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("num_outputs", [1, 31, 33, 100])
@pytest.mark.parametrize("format_name", TILE_FORMATS)
def test_repacking_loses_nothing(kernels: OnTensors, format_name: str, num_outputs: int) -> None:
    """127 in one column is exact in 8 bits and in bfloat16: what comes out is the column's weights."""
    tensor = random_packed(format_name, num_outputs, 256)
    matrix = decoded([tensor])
    weight = load(kernels, [tensor])
    columns = kernels.linear(127.0 * torch.eye(256), weight)
    assert ((columns.T.double() / 127 - matrix).abs() <= weight_error(kernels, matrix)).all()
    for first in range(0, 256, 5):  # the same by the path of few rows
        few = kernels.linear(127.0 * torch.eye(256)[first : first + 5], weight)
        assert torch.equal(few, columns[first : first + 5])


@pytest.mark.parametrize("num_outputs", [1, 31, 33, 100])
@pytest.mark.parametrize(
    ("format_name", "num_groups"),
    [(name, n) for name in TILE_FORMATS for n in (1, 2, 8, 16) if n * GROUP % input_width(name) == 0],
)
def test_products(kernels: OnTensors, format_name: str, num_outputs: int, num_groups: int) -> None:
    num_inputs = num_groups * GROUP
    tensor = random_packed(format_name, num_outputs, num_inputs)
    matrix, weight = decoded([tensor]), load(kernels, [tensor])
    x = torch.randn(130, num_inputs) * torch.logspace(-3, 3, num_groups).repeat_interleave(GROUP)
    for num_rows in (1, 2, 6, 7, 40, 130):
        assert_within_bound(kernels, x[:num_rows], matrix, kernels.linear(x[:num_rows], weight))
    assert kernels.linear(x[:0], weight).shape == (0, num_outputs)


def test_matrices_of_many_formats_side_by_side(kernels: OnTensors) -> None:
    tensors = [random_packed(name, 7 + 23 * i, 256, seed=i) for i, name in enumerate(TILE_FORMATS)]
    matrix, weight = decoded(tensors), load(kernels, tensors)
    bias = torch.randn(len(matrix)) * 10
    for num_rows in (1, 9, 60):
        x = torch.randn(num_rows, 256)
        assert_within_bound(kernels, x, matrix, kernels.linear(x, weight), None)
        assert_within_bound(kernels, x, matrix, kernels.linear(x, weight, bias), bias)
    singles = [kernels.linear(x, load(kernels, [tensor])) for tensor in tensors]
    assert torch.equal(torch.cat(singles, dim=1), kernels.linear(x, weight))


def test_one_loader_makes_independent_weights(kernels: OnTensors) -> None:
    loader = kernels.make_linear_loader()
    tensors = [random_packed("Q8_0", 5, 64, seed=seed) for seed in range(3)]
    weights = [loader.load([tensor]) for tensor in tensors]
    x = torch.randn(4, 64)
    for tensor, weight in zip(tensors, weights, strict=True):
        assert_within_bound(kernels, x, decoded([tensor]), kernels.linear(x, weight))


@pytest.mark.parametrize("format_name", TILE_FORMATS)
def test_extreme_values_stay_in_their_row(kernels: OnTensors, format_name: str) -> None:
    tensor = random_packed(format_name, 33, 256)
    matrix, weight = decoded([tensor]), load(kernels, [tensor])
    bias = torch.randn(33)
    plain = torch.randn(9, 256)
    expected = kernels.linear(plain, weight, bias)
    extremes = {
        "zeros": torch.zeros(256),
        "huge": torch.randn(256) * 1e30,
        "tiny": torch.randn(256) * 1e-39,  # below the normal floats: no reciprocal has a place for these
        "half tiny": torch.cat([torch.randn(32), torch.randn(224) * 1e-40]),
        "nan": plain[3].clone().index_fill_(0, torch.tensor([40]), math.nan),
        "inf": plain[3].clone().index_fill_(0, torch.tensor([200]), -math.inf),
        "all nan": torch.full((256,), math.nan),
    }
    for name, row in extremes.items():
        for num_rows in (1, 9):  # both paths
            position = num_rows // 2
            x = plain[:num_rows].clone()
            x[position] = row
            result = kernels.linear(x, weight, bias)
            others = [i for i in range(num_rows) if i != position]
            assert torch.equal(result[others], expected[others]), name
            own = result[position : position + 1]
            if "nan" in name or name == "inf":
                assert not own.isfinite().any(), name  # never a number that looks like an answer
            else:
                assert own.isfinite().all(), name
                assert_within_bound(kernels, row[None], matrix, own, bias)


@pytest.mark.parametrize("format_name", TILE_FORMATS)
def test_rows_do_not_depend_on_their_company(kernels: OnTensors, format_name: str) -> None:
    """Law 3: alone, in any batch, at any place, by any number of threads."""
    tensors = [random_packed(format_name, 70, 512), random_packed("Q6_K", 33, 512)]
    x, bias = torch.randn(600, 512), torch.randn(103)
    weight = load(kernels, tensors)
    expected = kernels.linear(x, weight, bias)
    for num_rows in range(1, 41):
        first = 13 * num_rows
        assert torch.equal(
            kernels.linear(x[first : first + num_rows], weight, bias), expected[first : first + num_rows]
        )
    order = torch.randperm(600)
    assert torch.equal(kernels.linear(x[order], weight, bias), expected[order])
    for num_threads in (2, 3):
        threaded = on_tensors(kernels.runtime.isa, num_threads)
        assert torch.equal(threaded.linear(x, weight, bias), expected)
        assert torch.equal(threaded.linear(x[7:8], weight, bias), expected[7:8])
        # And repacked by those threads.
        assert torch.equal(threaded.linear(x[:9], load(threaded, tensors), bias), expected[:9])


def test_large_batches_are_cut_without_a_trace(kernels: OnTensors) -> None:
    """More rows than fit the cache at once (wide inputs), and so several passes."""
    tensor = random_packed("Q4_K", 40, 4096)
    x = torch.randn(300, 4096)
    weight = load(kernels, [tensor])
    expected = kernels.linear(x, weight)
    assert_within_bound(kernels, x[::17], decoded([tensor]), expected[::17])
    assert torch.equal(kernels.linear(x[100:141], weight), expected[100:141])
    assert torch.equal(kernels.linear(x[299:], weight), expected[299:])


def test_instruction_sets_agree() -> None:
    torch.manual_seed(0)
    tensors = [random_packed(name, 40, 512, seed=i) for i, name in enumerate(PACKED_FORMATS)]
    x = torch.randn(9, 512)
    results = [on_tensors(isa).linear(x, load(on_tensors(isa), tensors)) for isa in ISAS if isa != "amx"]
    for result in results[1:]:
        # The integers are the same; only the float32 sums differ in order.
        assert (result - results[0]).abs().max() <= 1e-5 * results[0].abs().max()


@pytest.mark.parametrize("format_name", [*PACKED_FORMATS, *DENSE_FORMATS, "IQ4_XS"])
def test_memory_is_known_beforehand(kernels: OnTensors, format_name: str) -> None:
    for num_outputs in (1, 33, 128):
        tensor = random_packed(format_name, num_outputs, 256)
        assert load(kernels, [tensor]).num_bytes == kernels.num_weight_bytes(tensor)
    if format_name != "IQ4_XS":
        assert kernels.num_weight_bytes(tensor) <= 1.03 * tensor.data.nbytes  # of whole panels: the file's


@pytest.mark.parametrize("num_bytes", [-1, 1, -144])
@pytest.mark.parametrize("format_name", PACKED_FORMATS)
def test_wrong_sizes_are_refused(kernels: OnTensors, format_name: str, num_bytes: int) -> None:
    tensor = random_packed(format_name, 3, 256)
    data = np.resize(tensor.data, len(tensor.data) + num_bytes)
    with pytest.raises(ValueError, match="bytes"):
        load(kernels, [dataclasses.replace(tensor, data=data)])


def test_what_has_no_kernel_is_refused(kernels: OnTensors) -> None:
    weight = pelton_cpu.LinearWeight(64)
    data = np.zeros(4096, dtype=np.uint8)
    for format_name in ("Q2_K", "", "q4_0"):
        with pytest.raises(ValueError, match="no native kernel"):
            weight.add(kernels.runtime, format_name, 1, data.ctypes.data, 36)
    with pytest.raises(ValueError, match="multiple of a block"):
        weight.add(kernels.runtime, "Q4_K", 1, data.ctypes.data, 36)
    for format_name in PACKED_FORMATS:
        with pytest.raises(ValueError, match="multiple of a block"):
            pelton_cpu.LinearWeight(33).add(kernels.runtime, format_name, 1, data.ctypes.data, 36)
    assert weight.num_outputs == 0
    for num_inputs in (0, -32):
        with pytest.raises(ValueError, match="without inputs"):
            pelton_cpu.LinearWeight(num_inputs)
    with pytest.raises(ValueError, match="64"):
        kernels.linear(torch.zeros(1, 32), weight)
    with pytest.raises(ValueError, match="abacus"):
        NativeKernels(1, "abacus")
    with pytest.raises(ValueError, match="thread"):
        NativeKernels(0)
    with pytest.raises(ValueError, match="int3 activations"):
        NativeKernels(1, activation_dtype="int3")
    with pytest.raises(ValueError, match="need AMX"):
        NativeKernels(1, "portable", activation_dtype="bfloat16")


def test_what_has_no_kernel_is_kept_in_float32(kernels: OnTensors) -> None:
    """Formats that are only read, beside others; tiles leave such a weight alone."""
    tensors = [random_packed(name, 5, 256, seed=i) for i, name in enumerate(("IQ4_XS", "Q4_K", "BF16"))]
    x = torch.randn(3, 256)
    result = kernels.linear(x, load(kernels, tensors))
    assert_float_products(x, decoded(tensors[:1]), result[:, :5])
    assert_float_products(x, decoded(tensors[2:]), result[:, 10:])
    with pytest.raises(ValueError, match="256"):
        kernels.linear(x[:, :32], load(kernels, tensors))


def test_bfloat16_weights_are_multiplied_in_tiles() -> None:
    """Which round the activations; whole groups only, and not where float32 is asked for."""
    if "amx" not in ISAS:
        return
    for num_inputs, is_rounded in ((256, True), (250, False)):
        tensors, x = [random_packed("BF16", 40, num_inputs)], torch.randn(9, num_inputs)
        rounded = x.bfloat16().float()
        for activation_dtype in ("auto", "bfloat16", "float32", "int8"):
            kernels = on_tensors("amx", 1, activation_dtype)
            weight = load(kernels, tensors)
            same = torch.equal(kernels.linear(x, weight), kernels.linear(rounded, weight))
            assert same == (is_rounded and activation_dtype in ("auto", "bfloat16")), (num_inputs, activation_dtype)


def test_tiles_are_left_out_for_8_bits() -> None:
    if "amx" not in ISAS:
        return
    tensors, x = [random_packed("Q5_0", 40, 256)], torch.randn(9, 256)
    in_bytes = on_tensors("amx", 1, "int8")
    assert torch.equal(
        in_bytes.linear(x, load(in_bytes, tensors)), on_tensors("avx512").linear(x, load(in_bytes, tensors))
    )
    in_tiles = on_tensors("amx", 1, "bfloat16")
    assert torch.equal(
        in_tiles.linear(x, load(in_tiles, tensors)), on_tensors("amx").linear(x, load(in_tiles, tensors))
    )
