"""Products against float64, of every kind of weight, and law 3: a row's bits whatever the other rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pelton.weights.channel_quantization import round_channels
from pelton.weights.dequantize import dequantize
from pelton.weights.gguf.codes import bits_of, grouped_codes
from pelton.weights.gguf.formats import FORMATS
from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.triton import linear as linear_module
from pelton.worker.kernels.triton import tiles
from pelton.worker.kernels.triton.backend import TritonKernels
from pelton.worker.kernels.triton.device import find_device
from pelton.worker.kernels.triton.linear import Scratch, TritonLinearLoader, expand, linear, multiply
from pelton.worker.kernels.triton.norm import add_rms_norm, add_rms_norm_rounded
from pelton.worker.kernels.triton.quantize_rows import quantize_rows
from pelton.worker.kernels.triton.weights import num_weight_bytes

pytestmark = pytest.mark.torch

DEVICE = find_device()
PACKED = ("Q4_0", "Q4_1", "INT4", "INT4_CHANNEL", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "INT8")


def random_tensor(name: str, num_outputs: int, num_inputs: int, seed: int = 0) -> WeightTensor:
    """A matrix with random codes and small random scales."""
    rng = np.random.default_rng(seed)
    by_channel = {"INT8_CHANNEL": "w8a8", "INT4_CHANNEL": "w4a8"}
    if name == "F32" or name in by_channel:
        values = rng.standard_normal((num_outputs, num_inputs), np.float32) * np.float32(0.1)
        tensor = WeightTensor("w", (num_outputs, num_inputs), "F32", values.reshape(-1).view(np.uint8))
        if name == "F32":
            return tensor
        made = round_channels(tensor, by_channel[name])
        return WeightTensor("w", made.shape, name, made.data)
    block = FORMATS[name]
    blocks = rng.integers(0, 256, (num_outputs * num_inputs // block.block_size, block.block_bytes), np.uint8)
    for field, dtype, offset in _scale_fields(name):
        del field
        values = rng.uniform(0.001, 0.02, len(blocks)).astype(dtype)
        blocks[:, offset : offset + values.itemsize] = values.view(np.uint8).reshape(len(blocks), -1)
    return WeightTensor("w", (num_outputs, num_inputs), name, blocks.reshape(-1))


def _scale_fields(name: str) -> list[tuple[str, str, int]]:
    half, single = "<f2", "<f4"
    return {
        "Q4_0": [("d", half, 0)],
        "Q5_0": [("d", half, 0)],
        "Q8_0": [("d", half, 0)],
        "Q4_1": [("d", half, 0), ("m", half, 2)],
        "Q5_1": [("d", half, 0), ("m", half, 2)],
        "Q4_K": [("d", half, 0), ("m", half, 2)],
        "Q5_K": [("d", half, 0), ("m", half, 2)],
        "Q6_K": [("d", half, 208)],
        "INT4": [("d", single, 0), ("m", single, 4)],
        "INT8": [("d", single, 0)],
    }[name]


def load(tensors, dtype=torch.float32, **options):
    return TritonLinearLoader(dtype, DEVICE, Scratch(DEVICE), **options).load(tensors)


def dense(tensor: WeightTensor) -> torch.Tensor:
    return torch.from_numpy(dequantize(tensor)).to(DEVICE)


def exact(x: torch.Tensor, *tensors: WeightTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    matrix = torch.cat([dense(tensor).double() for tensor in tensors])
    y = x.double() @ matrix.T
    return y if bias is None else y + bias.double()


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


def rows(count: int, size: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize(("count", "outputs", "inputs"), [(1, 70, 64), (3, 130, 100), (17, 64, 257), (65, 130, 96)])
def test_dense_products(count: int, outputs: int, inputs: int) -> None:
    tensor, bias = random_tensor("F32", outputs, inputs), rows(1, outputs, seed=3)[0]
    x = rows(count, inputs)
    assert error(linear(x, load([tensor]), bias), exact(x, tensor, bias=bias)) < 1e-6


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_narrow_products_are_rounded_once(dtype: torch.dtype, limit: float) -> None:
    tensor, x = random_tensor("F32", 96, 320), rows(5, 320, dtype)
    matrix = dense(tensor).to(dtype)
    y = linear(x, load([tensor], dtype))
    assert y.dtype is dtype
    assert error(y, x.double() @ matrix.double().T) < limit


@pytest.mark.parametrize("name", PACKED)
def test_packed_products(name: str) -> None:
    """Also groups of 16, 32 and more, inputs that fill no whole block of words, and minima."""
    tensor = random_tensor(name, 40, 256 if name.endswith("K") else 160)
    dtype = torch.bfloat16 if name in ("Q4_1", "Q6_K") else torch.float32
    x = rows(3, tensor.shape[1], dtype)
    # Scales are kept in float16 where it holds them, which costs K-quants, whose scales are products, 11 bits.
    assert error(linear(x, load([tensor], dtype)), exact(x, tensor)) < (4e-4 if dtype is torch.float32 else 4e-3)


@pytest.mark.parametrize("name", PACKED)
def test_codes_are_those_of_the_file(name: str) -> None:
    tensor = random_tensor(name, 6, 256)
    codes = grouped_codes(tensor)
    values = codes.codes.astype(np.float64) - (1 << (codes.bits - 1))
    values *= np.repeat(codes.scales, codes.group, axis=1)
    if codes.minima is not None:
        values -= np.repeat(codes.minima, codes.group, axis=1)
    np.testing.assert_allclose(values, dequantize(tensor), rtol=1e-5, atol=1e-6)
    assert bits_of(tensor) is not None
    assert bits_of(replace(tensor, format="Q2_K")) is None


def test_expanded_weights_are_those_of_the_file() -> None:
    for name in ("Q4_K", "Q6_K", "Q8_0"):
        tensor = random_tensor(name, 70, 256)
        weight = load([tensor]).weights.parts[0]
        torch.testing.assert_close(expand(weight, torch.float32), dense(tensor), rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize(("kind", "limit"), [("int8", 2e-2), ("fp8", 1e-1), ("fp8_block", 1e-1)])
@pytest.mark.parametrize(("count", "outputs", "inputs"), [(1, 70, 256), (19, 140, 300)])
def test_products_of_8_bits(kind: str, limit: float, count: int, outputs: int, inputs: int) -> None:
    """Close to floats, and much closer to the same product of the rounded numbers. The interpreter cuts float8 off
    where the device rounds, which doubles its error."""
    tensor, x = random_tensor("F32", outputs, inputs), rows(count, inputs, torch.bfloat16)
    weight = load([tensor], torch.bfloat16, quantization=kind)
    part = weight.weights.parts[0]
    codes, scales = quantize_rows(x, kind)
    if kind == "fp8_block":
        x_rounded = codes.double() * scales.double().repeat_interleave(128, dim=1)[:, :inputs]
        by_rows = part.scales.double().repeat_interleave(128, dim=0)[:outputs]
        w_rounded = part.matrix.double() * by_rows.repeat_interleave(128, dim=1)[:, :inputs]
    else:
        x_rounded, w_rounded = codes.double() * scales[:, None], part.matrix.double() * part.scales[:, None]
    y = linear(x, weight)
    assert error(y, x_rounded @ w_rounded.T) < 4e-3
    assert error(y, exact(x, tensor)) < limit


def test_channel_weights_keep_their_codes() -> None:
    tensor, x = random_tensor("INT8_CHANNEL", 40, 96), rows(4, 96)
    assert error(linear(x, load([tensor])), exact(x, tensor)) < 2e-2


@pytest.mark.parametrize("in_blocks", [True, False])
def test_float8_of_files(in_blocks: bool) -> None:
    """As checkpoints of Qwen3 and of compressed-tensors have it; matrices that end within a block of scales too."""
    rng, tensors = np.random.default_rng(0), []
    for outputs in (128, 70, 40):
        blocks = rng.integers(0, 256, (outputs, 8, 36), np.uint8)
        blocks[blocks & 127 == 127] = 0
        scales = rng.uniform(0.01, 0.02, (-(-outputs // 128), 2) if in_blocks else (outputs, 1)).astype(np.float32)
        wide = scales.repeat(128, 0)[:outputs].repeat(4, 1) if in_blocks else scales.repeat(8, 1)
        blocks[..., :4] = np.ascontiguousarray(wide)[..., None].view(np.uint8)
        tensors.append(WeightTensor(f"w{outputs}", (outputs, 256), "FP8", blocks.reshape(-1)))
    weight = load(tensors)
    assert {part.kind for part in weight.weights.parts} == {"fp8_block" if in_blocks else "fp8"}
    x = rows(3, 256)
    assert error(linear(x, weight), exact(x, *tensors)) < 1e-1
    codes, factors = quantize_rows(x, weight.weights.parts[0].kind)
    factors = factors.repeat_interleave(128, dim=1) if in_blocks else factors[:, None]
    assert error(linear(x, weight), exact(codes.double() * factors, *tensors)) < 1e-6


def test_matrices_of_several_layouts_lie_side_by_side() -> None:
    tensors = [
        random_tensor(name, size, 256, seed)
        for seed, (name, size) in enumerate([("Q4_K", 40), ("Q4_K", 24), ("Q6_K", 33), ("F32", 20)])
    ]
    x, bias = rows(5, 256), rows(1, 117, seed=3)[0]
    weight = load(tensors)
    assert len(weight.weights.parts) == 3
    assert error(linear(x, weight, bias), exact(x, *tensors, bias=bias)) < 4e-4


def whole_numbers(num_outputs: int, num_inputs: int) -> WeightTensor:
    """Whole numbers times a factor that changes every 128 inputs: sums of a block are exact in any order (numpy, which
    the interpreter multiplies with, has one for each shape), and those of blocks are not."""
    rng = np.random.default_rng(0)
    factors = rng.integers(128, 256, num_inputs // 128) * 2.0 ** rng.integers(-12, 0, num_inputs // 128)
    values = rng.integers(-7, 8, (num_outputs, num_inputs)) * np.repeat(factors, 128)
    return WeightTensor("w", (num_outputs, num_inputs), "F32", values.astype(np.float32).reshape(-1).view(np.uint8))


@pytest.mark.parametrize("name", ["F32", "Q4_K", "Q8_0", "INT8_CHANNEL", "fp8", "fp8_block"])
def test_a_row_has_the_same_bits_in_any_company(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices summed by programs of their own (few rows) and by one (many), at any place among others."""
    monkeypatch.setattr(tiles, "_MIN_SLICE", 256)
    monkeypatch.setattr(tiles, "_MIN_PACKED_SLICE", 256)
    tensor = whole_numbers(70, 512) if name.startswith("fp8") or name == "F32" else random_tensor(name, 70, 512)
    weight = load([tensor], quantization=name if name.startswith("fp8") else None)
    assert tiles.num_slices("float", 70, 512) == tiles.num_slices("packed", 70, 512) == 2
    x = rows(70, 512).mul_(4).round_()
    whole = linear(x, weight)
    for first, last in ((0, 1), (3, 20), (7, 40)):
        assert torch.equal(linear(x[first:last], weight), whole[first:last]), (first, last)
    mixed = x[torch.tensor([5, 69, 5, 0])].clone()
    assert torch.equal(linear(mixed, weight), whole[[5, 69, 5, 0]])


def test_bfloat16_rows_have_the_same_bits_before_they_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: whether tiles of 16 and of 128 rows, which are other shapes of `wgmma`, sum up alike."""
    monkeypatch.setattr(tiles, "_MIN_SLICE", 256)
    weight = load([whole_numbers(70, 512)], torch.bfloat16)
    x = rows(70, 512).mul_(4).round_().bfloat16()

    def product(part: torch.Tensor) -> torch.Tensor:
        y = torch.full((len(part), 70), float("nan"), device=DEVICE)
        multiply(part, weight.weights.parts[0], y, None, weight.scratch)
        return y

    whole = product(x)
    for first, last in ((0, 1), (3, 20), (7, 40)):
        assert torch.equal(product(x[first:last]), whole[first:last])


def test_scratch_is_left_as_it_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_MIN_SLICE", 256)
    weight = load([random_tensor("F32", 70, 1024)])
    linear(rows(3, 1024), weight)
    assert weight.scratch.counters.eq(0).all()
    weight.scratch.partial.fill_(float("nan"))
    assert linear(rows(3, 1024), weight).isfinite().all()


def test_extreme_values() -> None:
    tensor = random_tensor("F32", 64, 64)
    weight = load([tensor])
    x = rows(4, 64)
    x[1], x[2, 5], x[3] = 0.0, float("nan"), 1e30
    y = linear(x, weight)
    assert y[1].eq(0).all()
    assert y[2].isnan().all()
    assert y[0].isfinite().all()
    assert y[3].isfinite().all()
    assert linear(x[:0], weight).shape == (0, 64)
    for kind in ("int8", "fp8"):
        quantized = load([tensor], quantization=kind)
        assert linear(x[1:2], quantized).eq(0).all()


def test_rows_may_be_part_of_wider_ones() -> None:
    tensor, wide = random_tensor("F32", 64, 64), rows(4, 192)
    for kind in (None, "int8"):
        weight = load([tensor], quantization=kind)
        assert torch.equal(linear(wide[:, 64:128], weight), linear(wide[:, 64:128].contiguous(), weight))


@pytest.mark.parametrize("kind", ["int8", "fp8", "fp8_block"])
@pytest.mark.parametrize(("count", "size"), [(3, 200), (1, 2100), (20, 128)])
def test_norms_that_round_on_the_way(kind: str, count: int, size: int) -> None:
    """Tiles of one row and of several: the codes are those of the normed rows, to the bit."""
    x, weight, residual = rows(count, size), rows(1, size, seed=2)[0], rows(count, size, seed=5)
    x[0] = residual[0] = 0.0
    normed, total = add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)
    found, (codes, scales) = add_rms_norm_rounded(x, residual, weight, 1e-6, kind)
    assert torch.equal(found, normed)
    assert torch.equal(residual, total)
    expected = quantize_rows(normed, kind)
    assert torch.equal(codes.float(), expected[0].float())
    assert torch.equal(scales, expected[1])


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_products_take_rows_that_a_norm_has_rounded(quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = TritonKernels("float32", DEVICE, quantization=quantization)
    weight = kernels.make_linear_loader().load([random_tensor("F32", 70, 256)])
    x, residual, factors = rows(5, 256), rows(5, 256, seed=5), rows(1, 256, seed=2)[0]
    expected = linear(add_rms_norm(x.clone(), residual.clone(), factors, 1e-6)[0], weight)
    rounded: list[int] = []

    def counted(*args: object) -> object:
        rounded.append(1)
        return quantize_rows(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(linear_module, "quantize_rows", counted)
    normed, _ = kernels.add_rms_norm(x, residual, factors, 1e-6)
    assert torch.equal(linear(normed, weight), expected)
    assert not rounded
    assert torch.equal(linear(normed[:3], weight), expected[:3])  # other rows: rounded by themselves
    assert rounded


def test_sizes_in_memory_are_not_less_than_taken() -> None:
    for name in ("F32", "INT8_CHANNEL", *PACKED):
        tensor = random_tensor(name, 70, 512)
        part = load([tensor], torch.bfloat16).weights.parts[0]
        fields = [getattr(part, field) for field in part.__dataclass_fields__]
        taken = sum(each.nbytes for each in fields if isinstance(each, torch.Tensor))
        assert 0 < taken <= num_weight_bytes(tensor, torch.bfloat16)


def test_slices_are_a_function_of_the_weight() -> None:
    for outputs, inputs in ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (70, 100)):
        for kind in tiles.TABLES:
            length, count = tiles.slice_length(kind, outputs, inputs), tiles.num_slices(kind, outputs, inputs)
            assert length % 256 == 0
            assert (count - 1) * length < inputs <= count * length
    assert linear_module.choose_tile("float", 1).outputs >= 64
