"""config.json of Hugging Face -> `ModelSpec`.

Reads the flat configs of transformers 4 and 5, and the text part of Gemma 3's nested one. What a
config may leave out falls back to the defaults of the transformers class; sizes must be there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pelton.core.errors import UnsupportedModelError
from pelton.core.model_spec import ModelSpec, RopeSpec, make_kv_groups
from pelton.weights.architectures import (
    ARCHITECTURES,
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    check_spec,
    unsupported_architecture,
)
from pelton.weights.compressed.scheme import CompressedScheme, scheme_from_config
from pelton.weights.fields import Fields
from pelton.weights.mapped_file import shown
from pelton.weights.rope import RopeDefaults, extended_length, rope_from_config

DTYPES = ("float32", "bfloat16", "float16")
# What a multimodal config may say for the whole instead of for its text part.
_INHERITED = ("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings")

# An absent key takes these; a null does not (it switches a window or a softcap off).
_GEMMA_DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "qwen3_moe": {
        "sliding_window": 4096,
        "max_window_layers": 28,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
    },
    "gemma2": {**_GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    # Published Gemma 3 configs leave out whatever equals these.
    "gemma3": {
        **_GEMMA_DEFAULTS,
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
    },
}


def spec_from_config(path: Path, config: Mapping[str, Any]) -> ModelSpec:
    """`path` is the config's, for messages.

    Raises `ModelFileError` for missing or impossible values, `UnsupportedModelError` for a model that
    is well-formed but not implemented.
    """
    architecture, text_config = _resolve_architecture(path, config)
    fields = Fields(path, {**_DEFAULTS[architecture], **text_config})
    _refuse_unimplemented(fields, architecture)
    scheme = scheme_from_config(fields)
    is_gemma = architecture in ("gemma2", "gemma3")
    hidden_size = fields.integer("hidden_size", high=MAX_WIDTH)
    num_layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    num_heads = fields.integer("num_attention_heads", high=MAX_WIDTH)
    head_dim = _head_dim(fields, hidden_size, num_heads)
    max_position = fields.integer("max_position_embeddings")
    rope, rope_local = _ropes(fields, architecture, head_dim, max_position)
    bias = architecture == "qwen2" or fields.flag("attention_bias", False)
    spec = ModelSpec(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", high=MAX_WIDTH),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads, high=MAX_WIDTH),
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size", high=MAX_VOCABULARY),
        max_model_len=extended_length(architecture, max_position, rope),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, positive=False),
        rope=rope,
        rope_local=rope_local,
        kv_groups=make_kv_groups(_layer_windows(fields, architecture, num_layers)),
        hidden_act=_hidden_act(fields, is_gemma),
        attention_bias=bias,
        attention_output_bias=bias and architecture != "qwen2",
        mlp_bias=architecture == "llama" and fields.flag("mlp_bias", False),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        attention_scale=fields.number("query_pre_attn_scalar") ** -0.5 if is_gemma else None,
        attention_softcap=fields.optional_number("attn_logit_softcapping") if is_gemma else None,
        final_softcap=fields.optional_number("final_logit_softcapping") if is_gemma else None,
        embedding_scale=math.sqrt(hidden_size) if is_gemma else 1.0,
        **_mixture(fields, architecture),
        dtype=_dtype(fields),
        quantization=None if scheme is None else scheme.name,
    )
    check_spec(path, spec)
    return spec


def compression_from_config(path: Path, config: Mapping[str, Any]) -> CompressedScheme | None:
    """How the model's matrices are compressed, if they are. Raises as `spec_from_config`."""
    return scheme_from_config(Fields(path, _resolve_architecture(path, config)[1]))


def _resolve_architecture(path: Path, config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The registry name, and the config of the text model."""
    fields = Fields(path, config)
    model_type = fields.text("model_type", "")
    class_names = fields.texts("architectures") or []
    label = class_names[0] if class_names else model_type
    for architecture in ARCHITECTURES.values():
        known_class = not class_names or class_names[0] in architecture.class_names
        known_type = not model_type or model_type in architecture.model_types
        if known_class and known_type and (class_names or model_type):
            break
    else:
        raise unsupported_architecture(path, label or "(none named)")
    nested = fields.section("text_config")
    if nested is None:
        return architecture.name, config
    nested_type = nested.get("model_type", architecture.model_types[0])
    if architecture.name != "gemma3" or nested_type != "gemma3_text":
        raise unsupported_architecture(path, f"{label} with text model {shown(nested_type)}")
    inherited = {key: config[key] for key in _INHERITED if key in config}
    return architecture.name, {**inherited, **nested}


def _refuse_unimplemented(fields: Fields, architecture: str) -> None:
    if fields.flag("use_bidirectional_attention", False):
        raise UnsupportedModelError(f"{fields.path}: bidirectional attention is not supported")
    for key in ("num_local_experts", "num_experts"):
        if fields.get(key) and not ARCHITECTURES[architecture].is_mixture:
            raise UnsupportedModelError(f"{fields.path}: mixtures of experts are not supported ({key})")


def _mixture(fields: Fields, architecture: str) -> dict[str, Any]:
    """What `ModelSpec` says of experts. Raises `UnsupportedModelError` where only some layers have them."""
    if not ARCHITECTURES[architecture].is_mixture:
        return {}
    if fields.integer("decoder_sparse_step", 1, low=0) != 1 or fields.get("mlp_only_layers"):
        raise UnsupportedModelError(
            f"{fields.path}: layers without experts between others are not supported (decoder_sparse_step, "
            "mlp_only_layers)"
        )
    # transformers 4 and 5 call it differently.
    key = "num_experts" if fields.get("num_local_experts") is None else "num_local_experts"
    num_experts = fields.integer(key, 128, high=MAX_EXPERTS)
    return {
        "num_experts": num_experts,
        "num_experts_per_token": fields.integer("num_experts_per_tok", high=num_experts),
        "expert_size": fields.integer("moe_intermediate_size", high=MAX_WIDTH),
        "normalizes_experts": fields.flag("norm_topk_prob", False),
    }


def _head_dim(fields: Fields, hidden_size: int, num_heads: int) -> int:
    if fields.get("head_dim") is None and hidden_size % num_heads:
        fields.fail("head_dim", f"given, as hidden_size {hidden_size} is not a multiple of {num_heads} heads")
    return fields.integer("head_dim", hidden_size // num_heads or None, high=MAX_WIDTH)


def _hidden_act(fields: Fields, is_gemma: bool) -> str:
    # Early Gemma configs say "gelu" under hidden_act and mean the tanh form; transformers ignores it.
    key = "hidden_activation" if is_gemma else "hidden_act"
    name = fields.text(key, "gelu_pytorch_tanh" if is_gemma else "silu")
    if name == "gelu_pytorch_tanh":
        return "gelu_tanh"
    if name in ("silu", "swish"):
        return "silu"
    raise UnsupportedModelError(f"{fields.path}: activation {shown(name)} is not supported")


def _dtype(fields: Fields) -> str:
    name = fields.text("dtype", fields.text("torch_dtype", "float32"))
    if name not in DTYPES:
        raise UnsupportedModelError(
            f"{fields.path}: dtype {shown(name)} is not supported; supported are {', '.join(DTYPES)}"
        )
    return name


def _layer_windows(fields: Fields, architecture: str, num_layers: int) -> list[int | None]:
    """Sliding window of each layer, None where a layer attends to everything."""
    if architecture == "llama":
        return [None] * num_layers
    window = fields.optional_integer("sliding_window")
    if architecture == "mistral":
        return [window] * num_layers
    if architecture in ("qwen2", "qwen3", "qwen3_moe") and not fields.flag("use_sliding_window", False):
        return [None] * num_layers
    windowed = _windowed_layers(fields, architecture, num_layers, window)
    if window is None and any(windowed):
        fields.fail("sliding_window", "a number of tokens, as some layers have sliding attention")
    return [window if is_windowed else None for is_windowed in windowed]


def _windowed_layers(fields: Fields, architecture: str, num_layers: int, window: int | None) -> list[bool]:
    layer_types = fields.texts("layer_types")
    if layer_types is not None:
        if len(layer_types) != num_layers:
            fields.fail("layer_types", f"a list of {num_layers} names, one for each layer")
        unknown = set(layer_types) - {"full_attention", "sliding_attention"}
        if unknown:
            raise UnsupportedModelError(f"{fields.path}: layer type {shown(min(unknown))} is not supported")
        return [name == "sliding_attention" for name in layer_types]
    if architecture in ("qwen2", "qwen3", "qwen3_moe"):
        first = fields.integer("max_window_layers", low=0)
        return [window is not None and layer_id >= first for layer_id in range(num_layers)]
    period = 2 if architecture == "gemma2" else _gemma3_period(fields)
    return [bool((layer_id + 1) % period) for layer_id in range(num_layers)]


def _gemma3_period(fields: Fields) -> int:
    """Every so-many-th layer attends to everything."""
    return fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 6))


def _ropes(fields: Fields, architecture: str, head_dim: int, max_position: int) -> tuple[RopeSpec, RopeSpec | None]:
    """Rotary settings of the model, and for Gemma 3 those of its sliding layers."""
    partial = fields.number("partial_rotary_factor", 1.0)
    defaults = RopeDefaults(fields.number("rope_theta", 10000.0), head_dim, max_position, partial)
    parameters = fields.section("rope_parameters")
    scaling = fields.section("rope_scaling")
    nested = parameters is not None and any(isinstance(value, dict) for value in parameters.values())
    if architecture != "gemma3":
        if nested:
            fields.fail("rope_parameters", f"flat for architecture {architecture}")
        return rope_from_config(Fields(fields.path, parameters or scaling or {}), defaults), None
    local_defaults = RopeDefaults(fields.number("rope_local_base_freq"), head_dim, max_position, partial)
    if parameters is None:
        return rope_from_config(Fields(fields.path, scaling or {}), defaults), rope_from_config(
            Fields(fields.path, {}), local_defaults
        )
    sections = Fields(fields.path, parameters)
    if not nested:
        fields.fail("rope_parameters", "an object with full_attention and sliding_attention")
    return (
        rope_from_config(Fields(fields.path, sections.section("full_attention") or {}), defaults),
        rope_from_config(Fields(fields.path, sections.section("sliding_attention") or {}), local_defaults),
    )
