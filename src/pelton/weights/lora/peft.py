"""Adapters as `peft` saves them: adapter_config.json and adapter_model.safetensors (huggingface.co/docs/peft)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pelton.core.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from pelton.core.model_spec import ModelSpec
from pelton.weights.fields import Fields
from pelton.weights.lora.adapter import LoraTensors, LoraWeights, check_adapter
from pelton.weights.mapped_file import read_json_object, shown
from pelton.weights.safetensors import SafetensorsFile
from pelton.weights.tensors import WeightTensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# What does not change the meaning of the matrices, or is read here.
_PLAIN_KEYS = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "bias"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern"),
        *("alpha_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config", "runtime_config"),
        *("qalora_group_size", "ensure_weight_tying", "merge_weights"),
    }
)
# Why a key that is set makes an adapter another kind of thing. Others that are unknown and set are refused too.
_REASONS = {
    "use_dora": "DoRA scales the model's own weights",
    "modules_to_save": "whole modules are replaced",
    "trainable_token_indices": "rows of the embedding are replaced",
    "fan_in_fan_out": "its matrices are stored the other way round",
    "layer_replication": "it repeats layers",
    "lora_bias": "it adds biases",
    "target_parameters": "it changes parameters that are no linear layers",
    "alora_invocation_tokens": "it begins in mid-prompt",
}
# Initializations after which the model's own weights are as they were; others (PiSSA, OLoRA) take a part out of them.
_PLAIN_INITIALIZATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight")
# Of a multimodal model's text part.
_TEXT_PART = re.compile(r"^(?:model\.language_model\.|language_model\.model\.)")
# peft puts the model's own head beside an adapter of it.
_FROZEN_HEAD = "base_model.model.lm_head.base_layer.weight"
_MAX_PATTERNS = 4096
_MAX_PATTERN_CHARS = 256


def read_peft_adapter(folder: Path, spec: ModelSpec, max_rank: int) -> LoraWeights:
    """See `open_adapter`."""
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder}: no folder of an adapter ({CONFIG_FILE}, {WEIGHTS_FILE}), nor a .gguf file")
    if not (folder / WEIGHTS_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise ModelFileError(
            folder,
            f"holds only pickled weights (.bin), which can run code and are never loaded; save them as {WEIGHTS_FILE}",
        )
    config = _Config(folder / CONFIG_FILE)
    matrices: dict[str, dict[str, WeightTensor]] = {"A": {}, "B": {}}
    file = SafetensorsFile(folder / WEIGHTS_FILE)
    for name, info in file.tensors.items():
        if name == _FROZEN_HEAD and info.shape == (spec.vocab_size, spec.hidden_size):
            continue
        module, side = _module_of(file.path, name)
        if module in matrices[side]:
            raise ModelFileError(file.path, f"module {shown(module)} has two matrices {side}")
        matrices[side][module] = file.tensor(name)
    tensors = LoraTensors(file.path, matrices["A"], matrices["B"], config.base_model, config.scale_of)
    return check_adapter(tensors, spec, max_rank)


def _module_of(path: Path, name: str) -> tuple[str, str]:
    match = _TENSOR.fullmatch(name)
    if match is None:
        if "lora_magnitude_vector" in name or "lora_embedding" in name:
            raise UnsupportedModelError(
                f"{path}: tensor {shown(name)} is not of plain LoRA on linear layers, which alone is supported"
            )
        raise ModelFileError(path, f"tensor {shown(name)} is not a matrix of LoRA (...lora_A.weight, ...lora_B.weight)")
    return _TEXT_PART.sub("model.", match[1]), match[2]


class _Config:
    def __init__(self, path: Path) -> None:
        values = read_json_object(path)
        fields = Fields(path, values)
        _check_kind(path, values, fields)
        self._path = path
        self._rank = fields.integer("r")
        self._alpha = fields.number("lora_alpha")
        self._is_rank_stabilized = fields.flag("use_rslora", False)
        self._ranks = _patterns(path, fields, "rank_pattern")
        self._alphas = _patterns(path, fields, "alpha_pattern")
        self.base_model = fields.optional_text("base_model_name_or_path")

    def scale_of(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) where rank-stabilized (Kalajdzievski, arXiv:2312.03732)."""
        expected = self._value_of(module, self._ranks, self._rank)
        if rank != expected:
            raise ModelFileError(self._path, f"module {shown(module)} has rank {rank}; the config says {expected:g}")
        alpha = self._value_of(module, self._alphas, self._alpha)
        return alpha / (math.sqrt(rank) if self._is_rank_stabilized else rank)

    @staticmethod
    def _value_of(module: str, patterns: list[tuple[re.Pattern[str], float]], default: float) -> float:
        return next((value for pattern, value in patterns if pattern.fullmatch(module)), default)


def _check_kind(path: Path, values: Mapping[str, Any], fields: Fields) -> None:
    kind = fields.text("peft_type")
    if kind != "LORA":
        raise UnsupportedModelError(f"{path}: an adapter of type {shown(kind)}; LORA alone is supported")
    for key, value in values.items():
        if value and key not in _PLAIN_KEYS:
            reason = _REASONS.get(key)
            raise UnsupportedModelError(f"{path}: {shown(key)} is not supported" + (f": {reason}" if reason else ""))
    if fields.text("bias", "none") != "none":
        raise UnsupportedModelError(f"{path}: bias is {shown(values['bias'])}; biases of an adapter are not supported")
    initialization = values.get("init_lora_weights")
    if initialization not in _PLAIN_INITIALIZATIONS:
        raise UnsupportedModelError(
            f"{path}: init_lora_weights is {shown(initialization)}, which changes the model's own weights; convert the "
            "adapter to plain LoRA when it is saved (path_initial_model_for_weight_conversion)"
        )


def _patterns(path: Path, fields: Fields, key: str) -> list[tuple[re.Pattern[str], float]]:
    """Numbers by regular expression for the end of a module's name, as peft matches them: the first counts."""
    section = fields.section(key) or {}
    if len(section) > _MAX_PATTERNS:
        raise ModelFileError(path, f"{key} has {len(section)} entries; at most {_MAX_PATTERNS} are read")
    values = Fields(path, section, "")
    return [(_compile(path, key, pattern), values.number(pattern)) for pattern in section]


def _compile(path: Path, key: str, pattern: str) -> re.Pattern[str]:
    """Only such expressions as are matched in a short time: a file is not trusted."""
    quantifiers = len(re.findall(r"[*+?{]", pattern))
    if len(pattern) > _MAX_PATTERN_CHARS or quantifiers > 2 or re.search(r"\)[*+?{]|\(\?|\\[1-9]", pattern):
        raise UnsupportedModelError(f"{path}: {key} has the pattern {shown(pattern)}, which is too intricate")
    try:
        return re.compile(rf"(.*\.)?({pattern})")
    except (re.error, OverflowError, RecursionError) as error:
        raise ModelFileError(path, f"{key} has the pattern {shown(pattern)}: {error}") from error
