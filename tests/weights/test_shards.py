"""A model's tensors shared out among ranks: what all ranks have is the whole, and sums over ranks are its products."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pelton.core.errors import ConfigError
from pelton.core.model_spec import ModelSpec, RopeSpec, make_kv_groups
from pelton.weights.dequantize import dequantize
from pelton.weights.gguf.formats import FORMATS
from pelton.weights.random_tensor import RandomTensor
from pelton.weights.shards import cut_outputs, shard_spec, share_of, whole_shape
from pelton.weights.tensors import WeightTensor

SPEC = ModelSpec(
    architecture="llama",
    num_layers=1,
    hidden_size=512,
    intermediate_size=1024,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    vocab_size=100,
    max_model_len=512,
    rms_norm_eps=1e-6,
    rope=RopeSpec(theta=10_000.0, rotary_dim=64),
    kv_groups=make_kv_groups([None]),
)


def made(name: str, shape: tuple[int, ...], format_name: str = "F32") -> WeightTensor:
    layout = FORMATS[format_name]
    num_bytes = int(np.prod(shape)) // layout.block_size * layout.block_bytes
    data = np.random.default_rng(0).integers(0, 60, num_bytes, np.uint8)
    if format_name == "F32":
        data = np.random.default_rng(0).standard_normal(shape).astype(np.float32).reshape(-1).view(np.uint8)
    return WeightTensor(f"model.layers.0.{name}", shape, format_name, data)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("format_name", ["F32", "BF16", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("module", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.experts.3.up_proj"])
def test_shares_make_up_the_whole(module: str, format_name: str, size: int) -> None:
    tensor = made(f"{module}.weight", (64, 512), format_name)
    shares = [share_of(tensor, rank, size) for rank in range(size)]
    axis = 1 if module.endswith(("o_proj", "down_proj")) else 0
    for share in shares:
        assert whole_shape(tensor.name, share.shape, size) == tensor.shape
        # Quantized blocks stay as they are, unless a share would begin within one.
        assert share.format == ("F32" if axis == 1 and format_name == "Q4_K" and size == 4 else format_name)
    np.testing.assert_array_equal(np.concatenate([dequantize(share) for share in shares], axis), dequantize(tensor))


def test_what_is_added_up_is_added_once() -> None:
    bias = made("self_attn.o_proj.bias", (8,))
    total = sum(dequantize(share_of(bias, rank, 3)) for rank in range(3))
    np.testing.assert_array_equal(total, dequantize(bias))
    query_bias = made("self_attn.q_proj.bias", (8,))
    np.testing.assert_array_equal(dequantize(share_of(query_bias, 1, 2)), dequantize(query_bias)[4:])


@pytest.mark.parametrize("name", ["mlp.gate.weight", "input_layernorm.weight", "self_attn.q_norm.weight"])
def test_the_rest_is_whole_on_every_rank(name: str) -> None:
    tensor = made(name, (8, 8))
    assert share_of(tensor, 1, 2) is tensor
    assert whole_shape(tensor.name, tensor.shape, 2) == tensor.shape


def test_random_tensors_stay_unmade() -> None:
    tensor = RandomTensor("model.layers.0.mlp.down_proj.weight", (16, 32), 0.0, 1.0)
    for rank in range(2):
        share = share_of(tensor, rank, 2)
        assert isinstance(share, RandomTensor)
        assert share.shape == (16, 16)
    assert share_of(tensor, 0, 2).data.tobytes() != share_of(tensor, 1, 2).data.tobytes()
    assert cut_outputs(tensor, 4, 9).shape == (5, 32)


def test_the_spec_of_a_rank() -> None:
    part = shard_spec(SPEC, 4)
    assert (part.num_heads, part.num_kv_heads, part.intermediate_size) == (2, 1, 256)
    assert replace(part, num_heads=8, num_kv_heads=4, intermediate_size=1024) == SPEC
    with pytest.raises(ConfigError, match="tensor_parallel_size is 8, which does not divide the model's 4 key-value"):
        shard_spec(SPEC, 8)
