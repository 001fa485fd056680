"""A model's matrices shared out among ranks, as Megatron-LM does (Shoeybi et al., arXiv:1909.08053): of projections
into heads and into the feed-forward layer each rank has some of the outputs, of those back the same of the inputs, so
that what ranks have at the end of a half layer adds up to its result. Everything else each rank has whole.

Legend: O outputs, I inputs.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pelton.core.errors import ConfigError
from pelton.core.model_spec import ModelSpec
from pelton.weights.dequantize import dequantize
from pelton.weights.gguf.formats import FORMATS
from pelton.weights.random_tensor import RandomTensor
from pelton.weights.tensors import WeightTensor

_BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_INPUTS = ("o_proj", "down_proj")


def shard_spec(spec: ModelSpec, size: int) -> ModelSpec:
    """What one of `size` ranks has. Raises `ConfigError` where heads or widths do not come out even."""
    parts = {
        "query heads": spec.num_heads,
        "key-value heads": spec.num_kv_heads,
        "feed-forward units": spec.intermediate_size,
        "units of an expert": spec.expert_size,
    }
    for name, number in parts.items():
        if number % size:
            raise ConfigError(f"tensor_parallel_size is {size}, which does not divide the model's {number} {name}")
    return dataclasses.replace(
        spec,
        num_heads=spec.num_heads // size,
        num_kv_heads=spec.num_kv_heads // size,
        intermediate_size=spec.intermediate_size // size,
        expert_size=spec.expert_size // size,
    )


def whole_shape(name: str, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Of the tensor `name`, of which one of `size` ranks has `shape`."""
    module, kind = _module_of(name)
    if module in _BY_OUTPUTS:
        return (shape[0] * size, *shape[1:])
    if module in _BY_INPUTS and kind == "weight":
        return (shape[0], shape[1] * size)
    return shape


def share_of(tensor: WeightTensor, rank: int, size: int) -> WeightTensor:
    """What rank `rank` of `size` has of a tensor of a layer."""
    module, kind = _module_of(tensor.name)
    if module in _BY_OUTPUTS:
        count = tensor.shape[0] // size
        return cut_outputs(tensor, rank * count, (rank + 1) * count)
    if module not in _BY_INPUTS:
        return tensor
    if kind == "weight":
        count = tensor.shape[1] // size
        return _cut_inputs(tensor, rank * count, (rank + 1) * count)
    # A bias is added once.
    return tensor if rank == 0 else _from_floats(tensor.name, np.zeros(tensor.shape, np.float32))


def cut_outputs(tensor: WeightTensor, first: int, last: int) -> WeightTensor:
    """Rows [first, last)."""
    shape = (last - first, *tensor.shape[1:])
    if isinstance(tensor, RandomTensor):
        return RandomTensor(f"{tensor.name}#{first}", shape, tensor.mean, tensor.std)
    rows = tensor.data.reshape(tensor.shape[0], -1)[first:last]
    return WeightTensor(tensor.name, shape, tensor.format, rows.reshape(-1))


def _cut_inputs(tensor: WeightTensor, first: int, last: int) -> WeightTensor:
    """Columns [first, last). Where they begin or end within a quantized block, as floats."""
    num_outputs, num_inputs = tensor.shape
    shape = (num_outputs, last - first)
    if isinstance(tensor, RandomTensor):
        return RandomTensor(f"{tensor.name}#{first}", shape, tensor.mean, tensor.std)
    layout = FORMATS[tensor.format]
    if first % layout.block_size or last % layout.block_size:
        return _from_floats(tensor.name, dequantize(tensor)[:, first:last])
    blocks = tensor.data.reshape(num_outputs, num_inputs // layout.block_size, layout.block_bytes)
    kept = blocks[:, first // layout.block_size : last // layout.block_size]
    return WeightTensor(tensor.name, shape, tensor.format, np.ascontiguousarray(kept).reshape(-1))


def _from_floats(name: str, values: np.ndarray) -> WeightTensor:
    data = np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.uint8)
    return WeightTensor(name, values.shape, "F32", data)


def _module_of(name: str) -> tuple[str, str]:
    """("q_proj", "weight") of "model.layers.0.self_attn.q_proj.weight"."""
    _, _, rest = name.rpartition("layers.")
    module, _, kind = rest.rpartition(".")
    return module.rpartition(".")[2], kind
