"""Every block format against the decoder of the `gguf` package, bit for bit."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest

from pelton.weights.dequantize import CHUNK_VALUES, MIN_VALUES_PER_THREAD, dequantize, dequantize_rows
from pelton.weights.gguf.blocks import DECODERS
from pelton.weights.gguf.formats import FILE_TYPE_NAMES, FORMATS, GGML_TYPE_NAMES
from pelton.weights.tensors import WeightTensor

OWN_FORMATS = ("INT4", "INT8", "FP8", "INT8_CHANNEL", "INT4_CHANNEL")
ENCODABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def random_bytes(name: str, num_rows: int, num_columns: int, seed: int = 0) -> np.ndarray:
    """Any byte may stand in a block: every bit pattern decodes to something (also inf and NaN)."""
    row_bytes = num_columns // FORMATS[name].block_size * FORMATS[name].block_bytes
    return np.random.default_rng(seed).integers(0, 256, (num_rows, row_bytes), dtype=np.uint8)


def reference(name: str, packed: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        if name in OWN_FORMATS:
            return own_reference(name, packed)
        return gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name])


def own_reference(name: str, packed: np.ndarray) -> np.ndarray:
    """Block by block, code by code."""
    size = FORMATS[name].block_bytes
    rows = []
    for row in packed:
        values: list[np.float32] = []
        for block in row.reshape(-1, size):
            scale = block[:4].view(np.float32)[0]
            if name == "FP8":
                values += [np.float32(float8(int(code))) * scale for code in block[4:]]
            elif name.startswith("INT8"):
                values += [np.float32(code) * scale for code in block[4:].view(np.int8)]
            else:
                codes = [int(code) & 15 for code in block[-16:]] + [int(code) >> 4 for code in block[-16:]]
                if name == "INT4":
                    minimum = block[4:8].view(np.float32)[0]
                    values += [np.float32(code) * scale - minimum for code in codes]
                else:
                    step, base = int(block[4]), int(block[5])
                    values += [np.float32(base + step * code - 128) * scale for code in codes]
        rows.append(values)
    return np.array(rows, dtype=np.float32)


def float8(code: int) -> float:
    """e4m3 without infinities: one sign, four exponent and three mantissa bits; all ones are NaN."""
    sign, exponent, mantissa = (-1 if code & 128 else 1), code >> 3 & 15, code & 7
    if code & 127 == 127:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """One NaN is as good as another."""
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(actual.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])


def tensor_of(name: str, packed: np.ndarray, num_columns: int) -> WeightTensor:
    return WeightTensor("t", (len(packed), num_columns), name, packed.reshape(-1))


@pytest.mark.parametrize("name", FORMATS)
def test_random_bytes_decode_as_in_ggml(name: str) -> None:
    packed = random_bytes(name, 12, 1024)
    assert_same_bits(dequantize(tensor_of(name, packed, 1024)), reference(name, packed))


@pytest.mark.parametrize("name", ENCODABLE)
def test_encoded_weights_decode_as_in_ggml(name: str) -> None:
    weights = np.random.default_rng(1).standard_normal((8, 512)).astype(np.float32)
    packed = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[name]).view(np.uint8)
    decoded = dequantize(tensor_of(name, packed, 512))
    assert_same_bits(decoded, reference(name, packed))
    assert np.abs(decoded - weights).max() < 0.5


def test_tables_agree_with_ggml() -> None:
    assert set(DECODERS) == set(FORMATS)
    for name, tensor_format in FORMATS.items():
        if name in OWN_FORMATS:
            continue
        sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        assert sizes == (tensor_format.block_size, tensor_format.block_bytes)
    for number, name in GGML_TYPE_NAMES.items():
        assert gguf.GGMLQuantizationType(number).name == name
    for number, name in FILE_TYPE_NAMES.items():
        assert gguf.LlamaFileType(number).name in (f"MOSTLY_{name}", f"ALL_{name}")


@pytest.mark.parametrize("name", ["F32", "BF16", "Q5_0", "Q6_K"])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_row_ranges_and_threads_give_the_same_values(name: str, num_threads: int) -> None:
    num_columns = 768
    num_rows = 2 * MIN_VALUES_PER_THREAD // num_columns + 5  # several threads, a last chunk that is not full
    assert num_rows * num_columns > 4 * CHUNK_VALUES
    tensor = tensor_of(name, random_bytes(name, num_rows, num_columns), num_columns)
    whole = dequantize(tensor, num_threads=1)
    out = np.full((num_rows, num_columns), 7, dtype=np.float32)
    assert dequantize(tensor, out=out, num_threads=num_threads) is out
    assert_same_bits(out, whole)
    for rows in (slice(0, 1), slice(3, num_rows - 2), slice(num_rows - 1, None), slice(5, 5), slice(9, 2)):
        assert_same_bits(dequantize(tensor, rows=rows, num_threads=num_threads), np.ascontiguousarray(whole[rows]))


def test_single_rows() -> None:
    tensor = tensor_of("Q4_K", random_bytes("Q4_K", 20, 256), 256)
    whole = dequantize(tensor)
    picked = np.array([19, 0, 7, 7])
    assert_same_bits(dequantize_rows(tensor, picked), whole[picked])
    assert dequantize_rows(tensor, np.array([], dtype=np.int64)).shape == (0, 256)
    for bad in (20, -1):
        with pytest.raises(IndexError, match="from 0 to 19"):
            dequantize_rows(tensor, np.array([bad]))


def test_vectors_and_unaligned_views() -> None:
    weights = np.linspace(-2, 2, 64, dtype=np.float32)
    shifted = np.frombuffer(b"\0" + weights.tobytes(), dtype=np.uint8, offset=1)
    vector = WeightTensor("v", (64,), "F32", shifted)
    np.testing.assert_array_equal(dequantize(vector), weights)
    np.testing.assert_array_equal(dequantize(vector, rows=slice(2, 5)), weights[2:5])
    packed = WeightTensor("v", (64,), "Q8_0", random_bytes("Q8_0", 1, 64).reshape(-1))
    assert dequantize(packed).shape == (64,)
    with pytest.raises(ValueError, match="whole blocks"):
        dequantize(packed, rows=slice(0, 32))


@pytest.mark.parametrize(
    "out",
    [np.empty((3, 32), np.float32), np.empty((4, 32), np.float64), np.empty((4, 64), np.float32)[:, ::2]],
)
def test_wrong_out_is_refused(out: np.ndarray) -> None:
    tensor = tensor_of("Q8_0", random_bytes("Q8_0", 4, 32), 32)
    with pytest.raises(ValueError, match="contiguous float32 array of shape"):
        dequantize(tensor, out=out)
