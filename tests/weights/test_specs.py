"""config.json -> `ModelSpec`: keys old and new, windows, rotary settings, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pelton.core.errors import ModelFileError, UnsupportedModelError
from pelton.core.model_spec import ModelSpec, RopeSpec
from pelton.weights.specs import spec_from_config
from tests.weights.make_models import TINY_CONFIGS

PATH = Path("config.json")


def spec_of(architecture: str, **changes: Any) -> ModelSpec:
    """Of the tiny config with `changes`; a change to `...` removes the key."""
    config = {**TINY_CONFIGS[architecture], **changes}
    return spec_from_config(PATH, {key: value for key, value in config.items() if value is not ...})


def windows(spec: ModelSpec) -> list[int | None]:
    by_layer = {layer_id: group.sliding_window for group in spec.kv_groups for layer_id in group.layer_ids}
    return [by_layer[layer_id] for layer_id in range(spec.num_layers)]


def test_sizes_and_what_makes_an_architecture() -> None:
    llama = spec_of("llama")
    assert (llama.num_layers, llama.hidden_size, llama.intermediate_size, llama.vocab_size) == (3, 64, 96, 96)
    assert (llama.num_heads, llama.num_kv_heads, llama.head_dim, llama.max_model_len) == (4, 2, 16, 512)
    assert (llama.rms_norm_eps, llama.rope, llama.dtype) == (1e-6, RopeSpec(50000.0, 16), "float32")
    assert (llama.hidden_act, llama.attention_bias, llama.tie_word_embeddings) == ("silu", False, False)
    assert (llama.attention_scale, llama.attention_softcap, llama.embedding_scale) == (None, None, 1.0)

    qwen2 = spec_of("qwen2")
    assert (qwen2.attention_bias, qwen2.attention_output_bias, qwen2.tie_word_embeddings) == (True, False, True)

    gemma2 = spec_of("gemma2", query_pre_attn_scalar=144)
    assert (gemma2.hidden_act, gemma2.tie_word_embeddings) == ("gelu_tanh", True)
    assert (gemma2.attention_scale, gemma2.embedding_scale) == (pytest.approx(1 / 12), 8.0)
    assert (gemma2.attention_softcap, gemma2.final_softcap, gemma2.rope_local) == (50.0, 30.0, None)

    gemma3 = spec_of("gemma3")
    assert (gemma3.rope, gemma3.rope_local) == (RopeSpec(1e6, 32), RopeSpec(10000.0, 32))
    assert (gemma3.attention_softcap, gemma3.final_softcap) == (None, None)


def test_what_published_configs_leave_out() -> None:
    assert spec_of("llama", num_key_value_heads=...).num_kv_heads == 4
    assert spec_of("llama", head_dim=None).head_dim == 16
    assert spec_of("llama", head_dim=24).head_dim == 24
    assert spec_of("llama", architectures=...).architecture == "llama"
    assert spec_of("llama", model_type=...).architecture == "llama"
    assert spec_of("qwen3", head_dim=...).head_dim == 128
    assert spec_of("gemma2", head_dim=..., attn_logit_softcapping=...).attention_softcap == 50.0
    assert spec_of("gemma2", attn_logit_softcapping=None).attention_softcap is None
    assert spec_of("llama", dtype=..., torch_dtype="bfloat16").dtype == "bfloat16"
    assert spec_of("llama", rope_theta=...).rope.theta == 10000.0
    # google/gemma-3-4b-it names only these under text_config.
    text_config = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text_config,
        "torch_dtype": "bfloat16",
        "vision_config": {},
    }
    spec = spec_from_config(PATH, config)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (8, 4, 256, 262208)
    assert (spec.max_model_len, spec.dtype, spec.tie_word_embeddings) == (131072, "bfloat16", True)
    assert spec.rope == RopeSpec(1e6, 256, "linear", 8.0)
    assert spec.rope_local == RopeSpec(10000.0, 256)
    assert windows(spec) == [None if (i + 1) % 6 == 0 else 1024 for i in range(34)]


S, F = "sliding_attention", "full_attention"
WINDOWS: list[tuple[str, dict[str, Any], list[int | None]]] = [
    ("llama", {"sliding_window": 8}, [None, None, None]),
    ("mistral", {}, [32, 32, 32]),
    ("mistral", {"sliding_window": None}, [None, None, None]),
    ("mistral", {"sliding_window": ...}, [4096, 4096, 4096]),
    ("qwen2", {"sliding_window": 8}, [None, None, None]),
    ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, [None, 8, 8]),
    ("qwen2", {"sliding_window": 8, "use_sliding_window": True}, [None, None, None]),
    ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "layer_types": [S, F, S]}, [8, None, 8]),
    ("qwen2", {"sliding_window": None, "use_sliding_window": False, "layer_types": [F, F, F]}, [None, None, None]),
    ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, [8, 8, 8]),
    ("gemma2", {}, [16, None, 16]),
    ("gemma2", {"layer_types": [F, S, S]}, [None, 16, 16]),
    ("gemma3", {}, [16, 16, None]),
    ("gemma3", {"sliding_window_pattern": 2}, [16, None, 16]),
    ("gemma3", {"sliding_window_pattern": ..., "_sliding_window_pattern": 2}, [16, None, 16]),
    ("gemma3", {"sliding_window_pattern": ...}, [16, 16, 16]),
    ("gemma3", {"layer_types": [F, F, S]}, [None, None, 16]),
]


@pytest.mark.parametrize(("architecture", "changes", "expected"), WINDOWS)
def test_sliding_windows(architecture: str, changes: dict[str, Any], expected: list[int | None]) -> None:
    assert windows(spec_of(architecture, **changes)) == expected


YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
ROPES: list[tuple[dict[str, Any], RopeSpec, int]] = [
    ({"rope_scaling": None}, RopeSpec(50000.0, 16), 512),
    ({"rope_scaling": {"rope_type": "default"}}, RopeSpec(50000.0, 16), 512),
    ({"partial_rotary_factor": 0.5}, RopeSpec(50000.0, 8), 512),
    ({"rope_scaling": {"type": "linear", "factor": 4}}, RopeSpec(50000.0, 16, "linear", 4.0), 2048),
    (
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        RopeSpec(50000.0, 16, "llama3", 8.0, 1.0, 4.0, original_max_position=256),
        512,
    ),
    (
        {"rope_theta": ..., "rope_parameters": {"rope_theta": 7e5, "rope_type": "llama3", **LLAMA3}},
        RopeSpec(7e5, 16, "llama3", 8.0, 1.0, 4.0, original_max_position=256),
        512,
    ),
    (
        {"rope_scaling": {"type": "yarn", **YARN}},
        RopeSpec(50000.0, 16, "yarn", 4.0, original_max_position=128, attention_factor=0.1 * math.log(4) + 1),
        512,
    ),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        RopeSpec(50000.0, 16, "yarn", 4.0, original_max_position=512, attention_factor=0.1 * math.log(4) + 1),
        2048,
    ),
    (
        {"rope_scaling": {"type": "yarn", **YARN, "attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2}},
        RopeSpec(
            50000.0, 16, "yarn", 4.0, original_max_position=128, attention_factor=1.5, beta_fast=16.0, beta_slow=2.0
        ),
        512,
    ),
    (
        {"rope_scaling": {"type": "yarn", **YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        RopeSpec(50000.0, 16, "yarn", 4.0, original_max_position=128, attention_factor=1.0),
        512,
    ),
]


@pytest.mark.parametrize(("changes", "expected", "max_model_len"), ROPES)
def test_rotary_settings(changes: dict[str, Any], expected: RopeSpec, max_model_len: int) -> None:
    spec = spec_of("llama", **changes)
    assert spec.rope == expected
    assert spec.max_model_len == max_model_len


def test_rotary_settings_by_layer_type() -> None:
    parameters = {
        F: {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
        S: {"rope_type": "default", "rope_theta": 3e4},
    }
    spec = spec_of("gemma3", rope_parameters=parameters)
    assert (spec.rope, spec.rope_local) == (RopeSpec(2e6, 32, "linear", 8.0), RopeSpec(3e4, 32))
    spec = spec_of("gemma3", rope_theta=2e6, rope_local_base_freq=3e4, rope_scaling=parameters[F])
    assert (spec.rope, spec.rope_local) == (RopeSpec(2e6, 32, "linear", 8.0), RopeSpec(3e4, 32))


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_size": ...}, "hidden_size is missing"),
    ("llama", {"num_hidden_layers": None}, "num_hidden_layers is missing"),
    ("llama", {"vocab_size": "96"}, "vocab_size is '96'; it must be an integer"),
    ("llama", {"vocab_size": True}, "vocab_size is True"),
    ("llama", {"hidden_size": 64.0}, "hidden_size is 64.0"),
    ("llama", {"num_hidden_layers": 0}, "an integer from 1 to 4096"),
    ("llama", {"num_hidden_layers": 10**9}, "an integer from 1 to 4096"),
    ("llama", {"intermediate_size": 10**400}, "intermediate_size is"),
    ("llama", {"num_attention_heads": 5}, "not a multiple of 5 heads"),
    ("llama", {"num_key_value_heads": 3}, "4 query heads cannot share 3 key-value heads"),
    ("llama", {"num_key_value_heads": 8}, "4 query heads cannot share 8 key-value heads"),
    ("llama", {"head_dim": 15}, "rotary dimension 15 must be even"),
    ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
    ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; it must be a number"),
    ("llama", {"rope_theta": math.inf}, "rope_theta is inf"),
    ("llama", {"rope_theta": 10**400}, "finite number"),
    ("llama", {"rope_theta": 1}, "rotary base 1.0 must be greater than 1"),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "factor is missing"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
    ("llama", {"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "greater than low_freq_factor"),
    ("llama", {"rope_parameters": {F: {"rope_theta": 5.0}}}, "flat for architecture llama"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
    ("llama", {"architectures": "LlamaForCausalLM"}, "architectures is .* a list of strings"),
    ("llama", {"dtype": 4}, "dtype is 4; it must be a string"),
    ("gemma3", {"rope_parameters": {"rope_theta": 1e6}}, "full_attention and sliding_attention"),
    ("gemma2", {"layer_types": [F]}, "a list of 3 names"),
    ("gemma2", {"sliding_window": None}, "some layers have sliding attention"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
]


@pytest.mark.parametrize(("architecture", "changes", "problem"), BAD)
def test_impossible_config_is_a_typed_error(architecture: str, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelFileError, match=problem) as caught:
        spec_of(architecture, **changes)
    assert str(caught.value).startswith("config.json: ")


ALL_SUPPORTED = "supported are llama, mistral, qwen2, qwen3, qwen3_moe, gemma2, gemma3"
UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2", {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"}, ALL_SUPPORTED),
    ("qwen2", {"architectures": ["Qwen2ForSequenceClassification"]}, ALL_SUPPORTED),
    ("qwen2", {"model_type": "qwen2_moe"}, ALL_SUPPORTED),
    ("llama", {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "'MixtralForCausalLM' is not"),
    ("llama", {"architectures": ..., "model_type": ...}, "none named"),
    ("llama", {"text_config": {"model_type": "llama"}}, "with text model 'llama'"),
    ("gemma3", {"text_config": {"model_type": "gemma3n_text"}}, "with text model 'gemma3n_text'"),
    ("llama", {"num_local_experts": 8}, "mixtures of experts"),
    ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}, "method 'bitsandbytes'"),
    ("llama", {"hidden_act": "relu"}, "activation 'relu'"),
    ("llama", {"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
    ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope scaling 'longrope'"),
    ("gemma2", {"layer_types": [F, F, "chunked_attention"]}, "layer type 'chunked_attention'"),
    ("gemma3", {"use_bidirectional_attention": True}, "bidirectional"),
]


@pytest.mark.parametrize(("architecture", "changes", "problem"), UNSUPPORTED)
def test_model_that_is_not_implemented_is_refused(architecture: str, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UnsupportedModelError, match=problem):
        spec_of(architecture, **changes)


TRANSFORMERS_CONFIGS: list[tuple[str, str, dict[str, Any]]] = [
    ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}),
    ("LlamaConfig", "LlamaForCausalLM", {"head_dim": 24, "attention_bias": True, "mlp_bias": True}),
    ("MistralConfig", "MistralForCausalLM", {"sliding_window": 64}),
    ("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    ("Qwen2Config", "Qwen2ForCausalLM", {}),
    ("Qwen2Config", "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}),
    ("Qwen2Config", "Qwen2ForCausalLM", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}}),
    ("Qwen3Config", "Qwen3ForCausalLM", {"attention_bias": True}),
    ("Gemma2Config", "Gemma2ForCausalLM", {"query_pre_attn_scalar": 144}),
    ("Gemma3TextConfig", "Gemma3ForCausalLM", {"sliding_window": 64}),
]


@pytest.mark.torch
@pytest.mark.parametrize(("class_name", "model_class", "changes"), TRANSFORMERS_CONFIGS)
def test_configs_that_transformers_writes(
    tmp_path: Path, class_name: str, model_class: str, changes: dict[str, Any]
) -> None:
    import transformers

    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 7, "num_attention_heads": 4}
    config = getattr(transformers, class_name)(
        **sizes, num_key_value_heads=2, vocab_size=300, architectures=[model_class], **changes
    )
    config.save_pretrained(tmp_path)
    spec = spec_from_config(PATH, json.loads((tmp_path / "config.json").read_text()))
    assert (spec.hidden_size, spec.intermediate_size, spec.num_layers) == (128, 96, 7)
    assert (spec.num_heads, spec.num_kv_heads, spec.vocab_size) == (4, 2, 300)
    assert spec.head_dim == getattr(config, "head_dim", 32)
    assert spec.rms_norm_eps == config.rms_norm_eps
    assert spec.tie_word_embeddings == config.tie_word_embeddings
    types = getattr(config, "layer_types", None) or [S if getattr(config, "sliding_window", None) else F] * 7
    assert windows(spec) == [config.sliding_window if kind == S else None for kind in types]
    rope = config.rope_parameters
    if S in rope:
        assert spec.rope_local is not None
        assert spec.rope_local.theta == rope[S]["rope_theta"]
        rope = rope[F]
    assert spec.rope.theta == rope["rope_theta"]
    assert spec.rope.scaling_kind == rope["rope_type"].replace("default", "none")
    assert spec.rope.scaling_factor == rope.get("factor", 1.0)
    if class_name.startswith("Gemma"):
        assert spec.attention_scale == config.query_pre_attn_scalar**-0.5
        assert spec.attention_softcap == config.attn_logit_softcapping
        assert spec.final_softcap == config.final_logit_softcapping
