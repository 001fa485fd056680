"""GGUF metadata -> `ModelSpec`, where it says more or less than a config.json."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from pelton.core.errors import ModelFileError, UnsupportedModelError
from pelton.core.model_spec import ModelSpec, RopeSpec
from pelton.weights.gguf.reader import read_gguf
from pelton.weights.gguf.spec import spec_from_gguf

SIZES: dict[str, Any] = {
    "block_count": 6,
    "context_length": 512,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
EMBEDDING = {"token_embd.weight": (96, 64)}


def spec_of(
    tmp_path: Path,
    architecture: str,
    changes: dict[str, Any] | None = None,
    *,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, tuple[int, ...]] = EMBEDDING,
) -> ModelSpec:
    """Of a file with `SIZES` and `changes` (removed by `...`) under the architecture's prefix."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**SIZES, **(changes or {})}.items():
        if value is not ...:
            _add(writer, f"{architecture}.{key}", value)
    for key, value in (keys or {}).items():
        _add(writer, key, value)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return spec_from_gguf(read_gguf(path))


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kind = gguf.GGUFValueType.UINT32 if type(value) is int and value >= 0 else gguf.GGUFValueType.get_type(value)
    writer.add_key_value(key, value, kind)


def windows(spec: ModelSpec) -> list[int | None]:
    by_layer = {layer_id: group.sliding_window for group in spec.kv_groups for layer_id in group.layer_ids}
    return [by_layer[layer_id] for layer_id in range(spec.num_layers)]


def test_defaults_of_llama_cpp(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "llama", {"attention.head_count_kv": ...})
    assert (spec.num_kv_heads, spec.head_dim, spec.rope) == (4, 16, RopeSpec(10000.0, 16))
    assert (spec.vocab_size, spec.tie_word_embeddings, spec.max_model_len) == (96, True, 512)
    gemma3 = spec_of(tmp_path, "gemma3", {"attention.sliding_window": 8})
    assert (gemma3.rope.theta, gemma3.rope_local) == (1e6, RopeSpec(10000.0, 16))
    assert gemma3.final_softcap is None
    gemma2 = spec_of(tmp_path, "gemma2")
    assert (gemma2.attention_softcap, gemma2.final_softcap, windows(gemma2)[0]) == (50.0, 30.0, 4096)


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("llama", {}, [None] * 6),
        ("llama", {"attention.sliding_window": 8}, [8] * 6),
        ("qwen2", {"attention.sliding_window": 8}, [None] * 6),
        ("gemma2", {"attention.sliding_window": 8}, [8, None] * 3),
        ("gemma3", {"attention.sliding_window": 8}, [8] * 5 + [None]),
        ("gemma3", {"attention.sliding_window": 8, "attention.sliding_window_pattern": 3}, [8, 8, None] * 2),
        (
            "gemma3",
            {"attention.sliding_window": 8, "attention.sliding_window_pattern": [False, True] * 3},
            [None, 8] * 3,
        ),
    ],
)
def test_sliding_windows(
    tmp_path: Path, architecture: str, changes: dict[str, Any], expected: list[int | None]
) -> None:
    assert windows(spec_of(tmp_path, architecture, changes)) == expected


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 256}


@pytest.mark.parametrize(
    ("changes", "rope", "max_model_len"),
    [
        ({"rope.freq_base": 5e5, "rope.dimension_count": 8}, RopeSpec(5e5, 8), 512),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, RopeSpec(1e4, 16), 512),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, RopeSpec(1e4, 16), 512),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, RopeSpec(1e4, 16, "linear", 4.0), 2048),
        ({"rope.scale_linear": 4.0}, RopeSpec(1e4, 16, "linear", 4.0), 2048),
        (
            YARN,
            RopeSpec(1e4, 16, "yarn", 4.0, original_max_position=256, attention_factor=0.1 * math.log(4) + 1),
            1024,
        ),
        (
            {**YARN, "rope.scaling.attn_factor": 0.5, "rope.scaling.yarn_beta_fast": 16.0},
            RopeSpec(
                1e4,
                16,
                "yarn",
                4.0,
                original_max_position=256,
                attention_factor=0.5 * (0.1 * math.log(4) + 1),
                beta_fast=16.0,
            ),
            1024,
        ),
    ],
)
def test_rotary_settings(tmp_path: Path, changes: dict[str, Any], rope: RopeSpec, max_model_len: int) -> None:
    spec = spec_of(tmp_path, "llama", changes)
    assert (spec.rope, spec.max_model_len) == (rope, max_model_len)


def test_sizes_of_gemma_whose_attention_scales_by_width(tmp_path: Path) -> None:
    assert spec_of(tmp_path, "gemma2", {"attention.key_length": 32, "attention.value_length": 32}).attention_scale == (
        pytest.approx(32**-0.5)
    )
    for architecture, num_layers in (("gemma2", 46), ("gemma3", 62)):
        changes = {"block_count": num_layers, "attention.key_length": 32, "attention.value_length": 32}
        assert spec_of(tmp_path, architecture, changes).attention_scale == pytest.approx(16**-0.5)
    assert spec_of(tmp_path, "gemma3", {"attention.scale": 0.25}).attention_scale == 0.25


def test_biases_are_read_from_the_tensors(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "qwen2", tensors={**EMBEDDING, "blk.0.attn_q.bias": (64,), "output.weight": (96, 64)})
    assert (spec.attention_bias, spec.attention_output_bias, spec.mlp_bias) == (True, False, False)
    assert not spec.tie_word_embeddings


def test_quantization_name(tmp_path: Path) -> None:
    assert spec_of(tmp_path, "llama", keys={"general.file_type": 15}).quantization == "Q4_K_M"
    half = spec_of(tmp_path, "llama", keys={"general.file_type": 1})
    assert (half.quantization, half.dtype) == (None, "float16")
    unnamed = spec_of(tmp_path, "llama")
    assert (unnamed.quantization, unnamed.dtype) == (None, "float32")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"block_count": ...}, "llama.block_count is missing"),
        ({"block_count": "six"}, "llama.block_count is 'six'"),
        ({"block_count": 2**31}, "llama.block_count is"),
        ({"attention.layer_norm_rms_epsilon": math.inf}, "llama.attention.layer_norm_rms_epsilon is inf"),
        ({"attention.head_count": [4.5, 4.5]}, "attention.head_count is 4.5"),
        ({"attention.head_count_kv": 3}, "4 query heads cannot share 3"),
        ({"attention.head_count": 5}, "not a multiple of 5 heads"),
        ({"rope.dimension_count": 18}, "rotary dimension 18"),
        ({"attention.sliding_window": [1, 2]}, "sliding_window"),
    ],
)
def test_impossible_metadata_is_a_typed_error(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelFileError, match=problem):
        spec_of(tmp_path, "llama", changes)


@pytest.mark.parametrize(
    ("architecture", "changes", "problem"),
    [
        ("qwen2moe", {}, "architecture 'qwen2moe' is not supported; supported are llama"),
        ("clip", {}, "architecture 'clip' is not supported"),
        ("llama", {"expert_count": 8}, "mixtures of experts"),
        ("llama", {"attention.causal": False}, "bidirectional"),
        ("llama", {"attention.key_length": 16, "attention.value_length": 32}, "keys of 16 and values of 32"),
        ("llama", {"attention.head_count_kv": [2, 2, 2, 1, 1, 1]}, "differs between layers"),
        ("llama", {"rope.scaling.type": "longrope"}, "rope scaling 'longrope'"),
    ],
)
def test_model_that_is_not_implemented_is_refused(
    tmp_path: Path, architecture: str, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=problem):
        spec_of(tmp_path, architecture, changes)


def test_equal_numbers_per_layer_are_one_number(tmp_path: Path) -> None:
    assert spec_of(tmp_path, "llama", {"attention.head_count_kv": [2] * 6}).num_kv_heads == 2


def test_embedding_gives_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"token_embd\.weight is missing"):
        spec_of(tmp_path, "llama", tensors={"output_norm.weight": (64,)})
    with pytest.raises(ModelFileError, match=r"\[vocabulary, width\] is expected"):
        spec_of(tmp_path, "llama", tensors={"token_embd.weight": (64,)})
