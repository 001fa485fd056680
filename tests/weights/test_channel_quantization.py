"""Weights rounded to 8 bits per output channel as they are loaded."""

from __future__ import annotations

import numpy as np

from pelton.weights.channel_quantization import ChannelQuantizedFiles, ChannelQuantizedTensor, GroupedFiles, in_groups
from pelton.weights.dequantize import dequantize
from pelton.weights.tensors import WeightTensor


def tensor_of(name: str, values: np.ndarray) -> WeightTensor:
    return WeightTensor(name, values.shape, "F32", np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def test_off_by_half_a_step_at_most() -> None:
    values = np.random.default_rng(0).standard_normal((300, 96), dtype=np.float32) * np.logspace(-8, 4, 300)[:, None]
    values = values.astype(np.float32)
    values[7] = 0.0
    tensor = ChannelQuantizedTensor(tensor_of("w", values))
    assert (tensor.format, tensor.shape) == ("INT8_CHANNEL", (300, 96))
    steps = np.abs(values).max(axis=1, keepdims=True) / 127
    assert (np.abs(dequantize(tensor) - values) <= 0.501 * steps).all()
    np.testing.assert_array_equal(dequantize(tensor, rows=slice(100, 103)), dequantize(tensor)[100:103])


class Files:
    """Tensors by name; of `ModelFiles` no more than a wrapper asks for."""

    path = spec = generation_defaults = chat_template = tokenizer_metadata = None

    def __init__(self, tensors: dict[str, WeightTensor]) -> None:
        self.tensors = tensors

    def tensor_names(self) -> list[str]:
        return list(self.tensors)

    def tensor(self, name: str) -> WeightTensor:
        return self.tensors[name]


def test_only_matrices_of_layers_that_stand_it() -> None:
    shapes = {
        "model.layers.0.mlp.down_proj.weight": (8, 64),
        "model.layers.0.self_attn.o_proj.weight": (8, 33),  # no whole groups
        "model.layers.0.self_attn.q_proj.weight": (8, 64),
        "model.layers.0.mlp.gate_proj.bias": (64,),
        "model.embed_tokens.weight": (8, 64),
        "lm_head.weight": (8, 64),
    }
    plain = Files({name: tensor_of(name, np.ones(shape, np.float32)) for name, shape in shapes.items()})
    quantized = ChannelQuantizedFiles(plain)  # type: ignore[arg-type]
    grouped = GroupedFiles(quantized)
    assert quantized.tensor_names() == list(shapes)
    for number, name in enumerate(shapes):
        assert quantized.tensor(name).format == ("F32" if number else "INT8_CHANNEL")
        assert grouped.tensor(name).format == ("F32" if number else "INT8")
        np.testing.assert_array_equal(dequantize(grouped.tensor(name)), dequantize(quantized.tensor(name)))
        assert in_groups(plain.tensor(name)) is plain.tensor(name)
