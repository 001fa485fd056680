"""GGUF metadata -> `ModelSpec`. Keys and fallbacks are those of llama.cpp."""

from __future__ import annotations

import math
from typing import Any

from pelton.core.errors import ModelFileError, UnsupportedModelError
from pelton.core.model_spec import ModelSpec, make_kv_groups
from pelton.weights.architectures import (
    ARCHITECTURES,
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    check_spec,
    unsupported_architecture,
)
from pelton.weights.fields import Fields
from pelton.weights.gguf.formats import FILE_TYPE_NAMES
from pelton.weights.gguf.reader import GGUFFile
from pelton.weights.rope import RopeDefaults, extended_length, rope_from_gguf

# The Gemma sizes that scale attention by the width per head instead of the head size, by layer count.
_WIDTH_SCALED_LAYERS = {"gemma2": 46, "gemma3": 62}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def spec_from_gguf(file: GGUFFile) -> ModelSpec:
    """Raises `ModelFileError` for missing or impossible values, `UnsupportedModelError` for a model that
    is well-formed but not implemented."""
    fields = Fields(file.path, file.metadata)
    gguf_name = fields.text("general.architecture")
    # Mistral files call themselves llama; the two differ only by the window, which the spec holds.
    architecture = next((each for each in ARCHITECTURES.values() if each.gguf_name == gguf_name), None)
    if architecture is None:
        raise unsupported_architecture(file.path, gguf_name)
    name = architecture.name
    arch = Fields(file.path, file.metadata, f"{gguf_name}.")
    if not architecture.is_mixture and arch.integer("expert_count", 0, low=0):
        raise UnsupportedModelError(f"{file.path}: mixtures of experts are not supported ({gguf_name}.expert_count)")
    if not arch.flag("attention.causal", True):
        raise UnsupportedModelError(f"{file.path}: bidirectional attention is not supported")
    is_gemma = name in ("gemma2", "gemma3")
    hidden_size = arch.integer("embedding_length", high=MAX_WIDTH)
    num_layers = arch.integer("block_count", high=MAX_LAYERS)
    num_heads = _per_layer_integer(arch, "attention.head_count", None)
    head_dim = _head_dim(arch, hidden_size, num_heads)
    max_position = arch.integer("context_length")
    gemma3_theta = 1000000.0 if name == "gemma3" else 10000.0
    rope = rope_from_gguf(arch, RopeDefaults(gemma3_theta, head_dim, max_position), _frequency_factors(file))
    local = Fields(file.path, {"rope.freq_base": arch.number("rope.freq_base_swa", 10000.0)})
    quantization = _quantization(file)
    spec = ModelSpec(
        architecture=name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=_per_layer_integer(arch, "feed_forward_length", None),
        num_heads=num_heads,
        num_kv_heads=_per_layer_integer(arch, "attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=_vocab_size(file),
        max_model_len=extended_length(name, max_position, rope),
        rms_norm_eps=arch.number("attention.layer_norm_rms_epsilon", positive=False),
        rope=rope,
        rope_local=(
            rope_from_gguf(local, RopeDefaults(10000.0, rope.rotary_dim, max_position), None)
            if name == "gemma3"
            else None
        ),
        kv_groups=make_kv_groups(_layer_windows(arch, name, num_layers)),
        hidden_act="gelu_tanh" if is_gemma else "silu",
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        attention_output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_scale=_attention_scale(arch, name, num_layers, hidden_size // num_heads, head_dim),
        attention_softcap=arch.number("attn_logit_softcapping", 50.0) if name == "gemma2" else None,
        final_softcap=(
            arch.number("final_logit_softcapping", 30.0)
            if name == "gemma2"
            else arch.optional_number("final_logit_softcapping")
        ),
        embedding_scale=math.sqrt(hidden_size) if is_gemma else 1.0,
        **(_mixture(arch) if architecture.is_mixture else {}),
        dtype=_DTYPES.get(quantization or "", "float32"),
        quantization=None if quantization in _DTYPES else quantization,
    )
    check_spec(file.path, spec)
    return spec


def _mixture(arch: Fields) -> dict[str, Any]:
    """What `ModelSpec` says of experts. Files say nothing of their weights: llama.cpp makes them add up to 1."""
    num_experts = arch.integer("expert_count", high=MAX_EXPERTS)
    return {
        "num_experts": num_experts,
        "num_experts_per_token": arch.integer("expert_used_count", high=num_experts),
        "expert_size": arch.integer("expert_feed_forward_length", high=MAX_WIDTH),
        "normalizes_experts": True,
    }


def _per_layer_integer(arch: Fields, key: str, default: int | None) -> int:
    """One number, or a list with one number per layer, which must be equal."""
    value = arch.get(key)
    if not isinstance(value, list):
        return arch.integer(key, default, high=MAX_WIDTH)
    if not value or any(item != value[0] for item in value):
        raise UnsupportedModelError(f"{arch.path}: {key} differs between layers, which is not supported")
    return Fields(arch.path, {key: value[0]}).integer(key, high=MAX_WIDTH)


def _head_dim(arch: Fields, hidden_size: int, num_heads: int) -> int:
    if arch.get("attention.key_length") is None and hidden_size % num_heads:
        arch.fail("attention.key_length", f"given, as {hidden_size} is not a multiple of {num_heads} heads")
    head_dim = arch.integer("attention.key_length", hidden_size // num_heads or None, high=MAX_WIDTH)
    value_dim = arch.integer("attention.value_length", head_dim, high=MAX_WIDTH)
    if value_dim != head_dim:
        raise UnsupportedModelError(f"{arch.path}: keys of {head_dim} and values of {value_dim} are not supported")
    return head_dim


def _attention_scale(arch: Fields, name: str, num_layers: int, width_per_head: int, head_dim: int) -> float | None:
    given = arch.number("attention.scale", 0.0, positive=False)
    if given:
        return given
    if name not in _WIDTH_SCALED_LAYERS:
        return None
    return math.pow(width_per_head if num_layers == _WIDTH_SCALED_LAYERS[name] else head_dim, -0.5)


def _layer_windows(arch: Fields, name: str, num_layers: int) -> list[int | None]:
    """Sliding window of each layer, None where a layer attends to everything."""
    window = arch.integer("attention.sliding_window", 4096 if name == "gemma2" else 0, low=0) or None
    if name in ("qwen2", "qwen3", "qwen3_moe"):
        return [None] * num_layers
    if name == "llama":
        return [window] * num_layers
    pattern = arch.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        if len(pattern) != num_layers or any(type(is_windowed) is not bool for is_windowed in pattern):
            arch.fail("attention.sliding_window_pattern", f"a list of {num_layers} booleans")
        return [window if is_windowed else None for is_windowed in pattern]
    period = arch.integer("attention.sliding_window_pattern", 2 if name == "gemma2" else 6)
    return [window if (layer_id + 1) % period else None for layer_id in range(num_layers)]


def _vocab_size(file: GGUFFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelFileError(file.path, "tensor token_embd.weight is missing")
    if len(embedding.shape) != 2 or embedding.shape[0] > MAX_VOCABULARY:
        raise ModelFileError(
            file.path, f"token_embd.weight has shape {embedding.shape}; [vocabulary, width] is expected"
        )
    return embedding.shape[0]


def _frequency_factors(file: GGUFFile) -> tuple[float, ...] | None:
    info = file.tensors.get("rope_freqs.weight")
    if info is None:
        return None
    if info.format != "F32" or len(info.shape) != 1 or info.shape[0] > MAX_WIDTH:
        raise ModelFileError(
            file.path, f"rope_freqs.weight is {info.format} of shape {info.shape}; F32 [n] is expected"
        )
    import numpy as np

    factors = file.tensor_data(info.name).view(np.float32)
    if not np.all(np.isfinite(factors)) or np.any(factors <= 0):
        raise ModelFileError(file.path, "rope_freqs.weight holds factors that are not positive and finite")
    return tuple(factors.tolist())


def _quantization(file: GGUFFile) -> str | None:
    """As users know it; a file that does not say is named after the format of most of its tensors."""
    name = FILE_TYPE_NAMES.get(Fields(file.path, file.metadata).integer("general.file_type", 1024, low=0))
    if name is not None:
        return name
    matrices = [info.format for info in file.tensors.values() if len(info.shape) == 2]
    return max(sorted(set(matrices)), key=matrices.count, default=None)
