"""Weights rounded with one scale per output channel as they are loaded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from pelton.weights.channel_quantization import ChangedFiles, QuantizedFiles, in_groups, round_channels
from pelton.weights.dequantize import dequantize
from pelton.weights.tensors import WeightTensor

FORMATS = {"w8a8": ("INT8_CHANNEL", "INT8"), "w4a8": ("INT4_CHANNEL", "INT4")}


def tensor_of(name: str, values: np.ndarray) -> WeightTensor:
    return WeightTensor(name, values.shape, "F32", np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def some_values(num_inputs: int = 96) -> np.ndarray:
    """Rows of every size, one of zeros, one of them with a group of zeros."""
    values = np.random.default_rng(0).standard_normal((300, num_inputs)) * np.logspace(-8, 4, 300)[:, None]
    values[7] = 0.0
    values[8, :32] = 0.0
    return values.astype(np.float32)


def test_8_bits_are_off_by_half_a_step_at_most() -> None:
    values = some_values()
    tensor = round_channels(tensor_of("w", values), "w8a8")
    assert (tensor.format, tensor.shape) == ("INT8_CHANNEL", (300, 96))
    steps = np.abs(values).max(axis=1, keepdims=True) / 127
    assert (np.abs(dequantize(tensor) - values) <= 0.501 * steps).all()
    np.testing.assert_array_equal(dequantize(tensor, rows=slice(100, 103)), dequantize(tensor)[100:103])


def test_4_bits_lie_between_the_ends_of_their_group() -> None:
    values = some_values()
    tensor = round_channels(tensor_of("w", values), "w4a8")
    assert (tensor.format, tensor.shape) == ("INT4_CHANNEL", (300, 96))
    rounded = dequantize(tensor)
    unit = np.abs(values).max(axis=1)[:, None, None] / 127
    groups = values.reshape(300, 3, 32)
    widest = np.maximum(np.ceil(np.ptp(groups, axis=2, keepdims=True) / np.where(unit > 0, unit, 1) / 15), 1) * unit
    errors = np.abs(rounded.reshape(groups.shape) - groups)
    # Half a step of the widest line, and half a unit for its base; what a narrower line cuts off is a step or two.
    assert (np.sqrt(np.square(errors).mean(axis=2, keepdims=True)) <= 0.5 * widest + 0.5 * unit).all()
    assert errors.max() <= (16 * widest).max()
    codes = rounded.reshape(groups.shape) / np.where(unit > 0, unit, 1)
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-3)
    assert np.abs(codes).max() <= 128.001
    assert not rounded[7].any()
    assert max(len(np.unique(group)) for group in rounded.reshape(-1, 32)) <= 16


def test_4_bits_keep_what_fits() -> None:
    """Groups that lie on a line of 16 integers already."""
    rng = np.random.default_rng(1)
    step, base = rng.integers(1, 9, (40, 2, 1)), rng.integers(-100, -20, (40, 2, 1))
    codes = base + step * np.concatenate([rng.integers(0, 16, (40, 2, 30)), np.full((40, 2, 2), (0, 15))], axis=2)
    codes[:, 0] -= 127 + codes[:, 0, -2:-1]  # so that the largest of a channel is 127
    values = (codes * 0.01).astype(np.float32).reshape(40, 64)
    np.testing.assert_allclose(dequantize(round_channels(tensor_of("w", values), "w4a8")), values, atol=1e-5)


def plain_lines(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step, base and q of groups [n, 32], as plainly as numpy says it."""
    low, high = codes.min(axis=1), codes.max(axis=1)
    found = []
    for narrower in range(3):
        step = np.maximum(np.ceil((high - low) / np.float32(15)) - narrower, 1)
        base = np.clip(np.rint((low + high - 15 * step) / 2), 0, 255 - 15 * step)
        q = np.clip(np.rint((codes - base[:, None]) / step[:, None]), 0, 15)
        found.append((np.square(q * step[:, None] + base[:, None] - codes).sum(axis=1), step, base, q))
    best, each = np.argmin([error for error, *_ in found], axis=0), np.arange(len(codes))
    step, base, q = (np.stack(values)[best, each] for values in list(zip(*found, strict=True))[1:])
    return step, base, q


def test_4_bits_are_those_of_the_plain_formula() -> None:
    """To the bit: what a start rounds is what another has kept on disk. More groups than are fitted at once."""
    values = np.random.default_rng(2).standard_normal((300, 512), np.float32) ** 3
    scales = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    step, base, q = plain_lines((values * (np.float32(1) / scales)).reshape(-1, 32) + np.float32(128))
    blocks = round_channels(tensor_of("w", values), "w4a8").data.reshape(-1, 22)
    np.testing.assert_array_equal(blocks[:, :4].copy().view(np.float32)[:, 0], np.repeat(scales[:, 0], 16))
    np.testing.assert_array_equal(blocks[:, 4:6], np.stack([step, base], axis=1))
    np.testing.assert_array_equal(np.concatenate([blocks[:, 6:] & 15, blocks[:, 6:] >> 4], axis=1), q)


@dataclass
class Spec:
    tie_word_embeddings: bool


class Files:
    """Tensors by name; of `ModelFiles` no more than a wrapper asks for."""

    path = generation_defaults = chat_template = tokenizer_metadata = None

    def __init__(self, is_tied: bool, tensors: dict[str, WeightTensor]) -> None:
        self.spec = Spec(is_tied)
        self.tensors = tensors

    def tensor_names(self) -> list[str]:
        return list(self.tensors)

    def tensor(self, name: str) -> WeightTensor:
        return self.tensors[name]


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("is_tied", [True, False])
def test_only_matrices_of_layers_that_stand_it(quantization: str, is_tied: bool) -> None:
    shapes = {
        "model.layers.0.mlp.down_proj.weight": (8, 64),
        "model.layers.0.self_attn.o_proj.weight": (8, 33),  # no whole groups
        "model.layers.0.self_attn.q_proj.weight": (8, 64),
        "model.layers.0.mlp.gate_proj.bias": (64,),
        "model.embed_tokens.weight": (8, 64),
    } | ({} if is_tied else {"lm_head.weight": (8, 64)})
    rng = np.random.default_rng(0)
    plain = Files(is_tied, {name: tensor_of(name, rng.standard_normal(s, np.float32)) for name, s in shapes.items()})
    quantized = QuantizedFiles(plain, quantization)  # type: ignore[arg-type]
    grouped = ChangedFiles(quantized, in_groups)
    assert not quantized.spec.tie_word_embeddings
    assert quantized.tensor_names() == grouped.tensor_names() == [*dict.fromkeys([*shapes, "lm_head.weight"])]
    for name in quantized.tensor_names():
        is_rounded = name in ("model.layers.0.mlp.down_proj.weight", "lm_head.weight")
        assert quantized.tensor(name).name == name
        formats = quantized.tensor(name).format, grouped.tensor(name).format
        assert formats == (FORMATS[quantization] if is_rounded else ("F32", "F32"))
        expected = dequantize(quantized.tensor(name))
        np.testing.assert_allclose(dequantize(grouped.tensor(name)), expected, rtol=2e-6, atol=2e-7)
        if not is_rounded:
            assert quantized.tensor(name) is in_groups(plain.tensor(name)) is plain.tensor(name)
