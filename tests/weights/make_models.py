"""Tiny models of every architecture as Hugging Face folders and as GGUF files.

The GGUF side goes through the `gguf` package (its writer and its table of tensor names) and follows
llama.cpp's converter, so that it is a witness independent of the code under test.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy

from pelton.weights.architectures import expected_tensors
from pelton.weights.specs import spec_from_config

VOCABULARY = 96

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "dtype": "float32",
}
# Architecture -> config.json, with what makes the architecture itself.
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 50000.0, **_SIZES},
    "mistral": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 32,
        "head_dim": 32,
        **_SIZES,
    },
    "qwen2": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        **_SIZES,
    },
    "qwen3": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 32,
        "rope_theta": 1e6,
        **_SIZES,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 32,
        "rope_theta": 1e6,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        **_SIZES,
    },
    "gemma2": {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        **_SIZES,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "sliding_window_pattern": 3,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        **_SIZES,
    },
}


def random_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Hugging Face name -> float32 weights of the model that `config` describes."""
    rng = np.random.default_rng(seed)
    spec = spec_from_config(Path("config.json"), config)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in expected_tensors(spec).items()}


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(dict(tensors), folder / "model.safetensors")
    return folder


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    quantized: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Convert as llama.cpp's convert_hf_to_gguf does.

    `quantized` is the format of the matrices; `extra_tensors` go in under their GGUF names, as they are.
    """
    architecture = {"mistral": "llama", "gemma3_text": "gemma3", "qwen3_moe": "qwen3moe"}.get(
        config["model_type"], config["model_type"]
    )
    writer = gguf.GGUFWriter(path, architecture)
    _write_sizes(writer, architecture, config)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{i}" for i in range(config["vocab_size"])])
    writer.add_eos_token_id(2)
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    names = gguf.get_tensor_name_map(_gguf_architecture(architecture), config["num_hidden_layers"])
    for hf_name, weights in _with_joined_experts(tensors).items():
        gguf_name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        converted = _to_gguf_layout(hf_name, weights, architecture, config)
        if converted.ndim == 1:
            writer.add_tensor(gguf_name, converted)
        else:
            writer.add_tensor(gguf_name, gguf.quants.quantize(converted, quantized), raw_dtype=quantized)
    for gguf_name, weights in (extra_tensors or {}).items():
        writer.add_tensor(gguf_name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _with_joined_experts(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The matrices of a layer's experts as one tensor."""
    joined: dict[str, Any] = {}
    for name, weights in tensors.items():
        if match := re.fullmatch(r"(.*\.experts)\.\d+(\..*)", name):
            joined.setdefault(match[1] + match[2], []).append(weights)
        else:
            joined[name] = weights
    return {name: np.stack(each) if isinstance(each, list) else each for name, each in joined.items()}


def _gguf_architecture(name: str) -> gguf.MODEL_ARCH:
    return next(architecture for architecture, its_name in gguf.MODEL_ARCH_NAMES.items() if its_name == name)


def _write_sizes(writer: gguf.GGUFWriter, architecture: str, config: Mapping[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if "sliding_window" in config:
        writer.add_sliding_window(config["sliding_window"])
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if "sliding_window_pattern" in config:
        writer.add_sliding_window_pattern(config["sliding_window_pattern"])


def _to_gguf_layout(name: str, weights: np.ndarray, architecture: str, config: Mapping[str, Any]) -> np.ndarray:
    if architecture == "llama" and name.endswith(("q_proj.weight", "q_proj.bias")):
        return _interleave(weights, config["num_attention_heads"])
    if architecture == "llama" and name.endswith(("k_proj.weight", "k_proj.bias")):
        return _interleave(weights, config["num_key_value_heads"])
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return weights + np.float32(1.0)
    return weights


def _interleave(weights: np.ndarray, num_heads: int) -> np.ndarray:
    halves = weights.reshape(num_heads, 2, len(weights) // num_heads // 2, *weights.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weights.shape))


# --- GGUF by hand, for files that no writer would write ---


def text(value: str | bytes) -> bytes:
    encoded = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(encoded)) + encoded


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, elements: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + elements


def tensor_info(name: str, dimensions: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


def raw_gguf(
    keys: list[bytes] = [],  # noqa: B006 (never changed)
    tensors: list[bytes] = [],  # noqa: B006
    data: bytes = b"",
    **header: Any,
) -> bytes:
    """`header` overrides magic, version, num_tensors, num_keys."""
    head = header.get("magic", b"GGUF") + struct.pack(
        "<IQQ",
        header.get("version", 3),
        header.get("num_tensors", len(tensors)),
        header.get("num_keys", len(keys)),
    )
    directory = head + b"".join(keys) + b"".join(tensors)
    return directory + bytes(-len(directory) % 32) + data
