"""Weights rounded natively as they are packed: every byte is that of numpy's rounding, packed."""

from __future__ import annotations

import ctypes
import warnings

import numpy as np
import numpy.typing as npt
import pytest

from pelton.weights.channel_quantization import CHANNEL_QUANTIZATIONS, round_channels
from pelton.weights.gguf.formats import FORMATS
from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.cpu import pelton_cpu
from pelton.worker.kernels.cpu.packed_weights import CollectedWeights, PlacedMatrix
from tests.worker.native import DENSE_FORMATS, ISAS, PACKED_FORMATS, native, random_packed

pytestmark = pytest.mark.torch

F32 = npt.NDArray[np.float32]


def packed_bytes(runtime: pelton_cpu.Runtime, tensor: WeightTensor) -> bytes:
    num_bytes = PlacedMatrix.of(tensor).num_bytes
    memory = pelton_cpu.WeightMemory(num_bytes + 64)
    ctypes.memset(memory.address, 0xA5, memory.num_bytes)
    weights = CollectedWeights(runtime, memory, 0)
    weights.add_to(pelton_cpu.LinearWeight(tensor.shape[1]), tensor)
    assert list(weights.matrices) == [tensor.name]
    assert ctypes.string_at(memory.address + num_bytes, 64) == b"\xa5" * 64
    return ctypes.string_at(memory.address, num_bytes)


def assert_rounded_alike(isa: str, source: WeightTensor) -> None:
    for quantization in CHANNEL_QUANTIZATIONS:
        rounded = round_channels(source, quantization)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plain = WeightTensor("w", rounded.shape, rounded.format, rounded.data)
        expected = packed_bytes(native(isa).runtime, plain)
        for num_threads in (1, 2):
            assert packed_bytes(native(isa, num_threads).runtime, rounded) == expected, (quantization, num_threads)


def of_values(values: F32) -> WeightTensor:
    return WeightTensor("w", values.shape, "F32", np.ascontiguousarray(values).reshape(-1).view(np.uint8))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", [*PACKED_FORMATS, *DENSE_FORMATS, "IQ4_XS"])
def test_every_format(isa: str, name: str) -> None:
    """Those that no kernel decodes (INT4, INT8) go through numpy."""
    assert_rounded_alike(isa, random_packed(name, 75, max(FORMATS[name].block_size, 32) * 3))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("num_outputs", "num_inputs"), [(1, 32), (31, 64), (32, 480), (33, 544), (100, 512), (64, 1056), (40, 4864)]
)
def test_sizes(isa: str, num_outputs: int, num_inputs: int) -> None:
    rng = np.random.default_rng(num_outputs)
    values = rng.standard_normal((num_outputs, num_inputs), dtype=np.float32)
    values **= rng.choice([1, 3, 9], (num_outputs, 1))
    assert_rounded_alike(isa, of_values(values))


def extreme_rows() -> F32:
    """Rows of 4 groups."""
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.standard_normal((200, 128)), rng.integers(-127, 128, (200, 128))]).astype(np.float32)
    for row, value in enumerate(
        (0.0, -0.0, 1.0, -3.0, 1e-45, 1e-41, 2.9e-39, 3.5e-38, 3.4e38, np.inf, -np.inf, np.nan)
    ):
        rows[row] = value  # constant
        rows[20 + row, 37] = value  # among others
        rows[40 + row, 32:64] = value  # a group
    rows[60, 5], rows[60, 70] = np.inf, np.nan
    rows[61:80] *= np.logspace(-45, -38, 19, dtype=np.float64)[:, None]  # denormals, all or in part
    rows[80:90] *= np.float32(8e37)
    rows[90, :64], rows[90, 64:] = 127.0, -127.0
    rows[91], rows[91, 0] = 0.5, 127.0  # halves
    rows[92] = np.arange(128) - 63.5
    rows[92, 0] = 127.0
    rows[93] = np.tile((-1.0, 1.0), 64)
    return rows


@pytest.mark.parametrize("isa", ISAS)
def test_extremes(isa: str) -> None:
    assert_rounded_alike(isa, of_values(extreme_rows()))


def test_rows_that_are_not_finite_are_nan() -> None:
    """And those too small to divide by are zeros: no other row is touched."""
    from pelton.weights.dequantize import dequantize

    values = np.ones((5, 32), np.float32)
    values[1, 3], values[2, 0], values[3], values[4] = np.inf, np.nan, 1e-41, 0.0
    for quantization in CHANNEL_QUANTIZATIONS:
        rounded = dequantize(round_channels(of_values(values), quantization))
        np.testing.assert_allclose(rounded[0], 1.0, rtol=1e-6)
        assert np.isnan(rounded[1:3]).all()
        assert not rounded[3:].any()


@pytest.mark.parametrize("quantization", CHANNEL_QUANTIZATIONS)
def test_what_does_not_fit_is_refused(quantization: str) -> None:
    runtime, format_name = native(ISAS[0]).runtime, round_channels(of_values(np.ones((2, 32))), quantization).format
    data = np.zeros(2 * 64, np.float32)
    cases = [(("Q9_9", format_name), 64, 512), (("F32", "Q8_0"), 64, 512), (("F32", format_name), 64, 508)]
    for formats, num_inputs, num_bytes in [*cases, (("Q4_K", format_name), 64, 512)]:
        with pytest.raises(ValueError, match=r"blocks of|rounded|wrong number"):
            pelton_cpu.LinearWeight(num_inputs).add_rounded(runtime, formats, 2, data.ctypes.data, num_bytes)
