"""`quantization_config` of a config.json -> how the integers of a matrix are laid out.

Layouts: GPTQ (Frantar et al., arXiv:2210.17323) as AutoGPTQ and GPTQModel write it, AWQ (Lin et al.,
arXiv:2306.00978) as AutoAWQ's "gemm" version, and the "int-quantized" and "pack-quantized" formats of
compressed-tensors. Where activations are to have 8 bits and one scale per token, and weights one per channel (W8A8),
products are of integers alone; else what activations are rounded to is left to the kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from pelton.core.errors import UnsupportedModelError
from pelton.weights.fields import Fields
from pelton.weights.mapped_file import shown

GROUP = 32  # inputs to a block of INT4, INT8 and FP8
SCALE_BLOCK = 128  # weights each way that share a scale in checkpoints of float8


@dataclass(frozen=True, slots=True)
class CompressedScheme:
    """One layout for all the matrices that are stored so; the others of the model are plain."""

    layout: str  # gptq, awq, plain (int8 matrices), packed (words of int32 along the inputs), fp8
    bits: int
    group_size: int | None  # inputs that share a scale; None: all of an output's
    zero_offset: int = 0  # added to the zero points as stored
    is_symmetric: bool = True
    rounds_tokens: bool = False  # activations to 8 bits, one scale per token
    scale_part: str = "weight_scale"  # of fp8

    @property
    def name(self) -> str:
        """As users know it."""
        if self.layout == "fp8":
            return f"fp8 {'channel' if self.group_size is None else f'{SCALE_BLOCK}x{SCALE_BLOCK}'}"
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        method = {"gptq": "GPTQ", "awq": "AWQ"}.get(self.layout, "compressed-tensors")
        return f"{method} int{self.bits} {group}"

    @property
    def parts(self) -> dict[str, bool]:
        """Ending of a stored tensor's name -> whether a compressed matrix must have it."""
        if self.layout == "gptq":
            return {"qweight": True, "qzeros": True, "scales": True, "g_idx": False}
        if self.layout == "awq":
            return {"qweight": True, "qzeros": True, "scales": True}
        if self.layout == "fp8":
            return {"weight": True, self.scale_part: True}
        if self.layout == "plain":
            return {"weight": True, "weight_scale": True, "weight_zero_point": False}
        zero_point = {} if self.is_symmetric else {"weight_zero_point": True}
        return {"weight_packed": True, "weight_scale": True, "weight_shape": False, "weight_g_idx": False, **zero_point}


def scheme_from_config(fields: Fields) -> CompressedScheme | None:
    """None where the model is not compressed.

    Raises `UnsupportedModelError` for a method or an option without an implementation, `ModelFileError` for
    values of the wrong type.
    """
    section = fields.section("quantization_config")
    if section is None:
        return None
    config = Fields(fields.path, section)
    method = config.text("quant_method", "")
    if method == "gptq":
        return _gptq(config)
    if method == "awq":
        return _awq(config)
    if method == "fp8":
        return _fp8(config)
    if method != "compressed-tensors":
        _refuse(config, f"method {shown(method)}; supported are gptq, awq, fp8 and compressed-tensors")
    return _compressed_tensors(config)


def _refuse(config: Fields, what: str) -> NoReturn:
    raise UnsupportedModelError(f"{config.path}: quantization is not supported: {what}")


def _gptq(config: Fields) -> CompressedScheme:
    _check_bits(config, config.integer("bits"), (4,))
    checkpoint_format = config.text("checkpoint_format", "gptq")
    if checkpoint_format not in ("gptq", "gptq_v2"):
        _refuse(config, f"checkpoint_format {shown(checkpoint_format)}")
    if _lists_anything(config, "dynamic"):
        _refuse(config, "gptq settings that differ between modules (dynamic)")
    # The first version stores zero points less 1.
    return CompressedScheme("gptq", 4, _group_size(config), zero_offset=int(checkpoint_format == "gptq"))


def _awq(config: Fields) -> CompressedScheme:
    _check_bits(config, config.integer("bits"), (4,))
    version = config.text("version", "gemm").lower()
    if version != "gemm":
        _refuse(config, f"awq version {shown(version)}; supported is gemm")
    return CompressedScheme("awq", 4, _group_size(config))


def _fp8(config: Fields) -> CompressedScheme:
    if config.get("weight_block_size") != [SCALE_BLOCK, SCALE_BLOCK]:
        _refuse(config, f"fp8 with weight_block_size {shown(config.get('weight_block_size'))}; supported is [128, 128]")
    if config.text("activation_scheme", "dynamic") != "dynamic":
        _refuse(config, "fp8 with scales of activations in the file (activation_scheme)")
    return CompressedScheme("fp8", 8, SCALE_BLOCK, scale_part="weight_scale_inv")


def _compressed_tensors(config: Fields) -> CompressedScheme:
    groups = config.section("config_groups") or {}
    if len(groups) != 1:
        _refuse(config, f"compressed-tensors with {len(groups)} config_groups; supported is one")
    group = Fields(config.path, groups).section(next(iter(groups))) or {}
    weights = Fields(config.path, group).section("weights")
    if weights is None:
        _refuse(config, "compressed-tensors without quantized weights")
    if config.section("kv_cache_scheme") or config.section("sparsity_config"):
        _refuse(config, "compressed-tensors with a kv_cache_scheme or a sparsity_config")
    targets = Fields(config.path, group).texts("targets") or []
    if targets != ["Linear"]:
        _refuse(config, f"compressed-tensors with targets {shown(targets)}; supported is Linear")
    inputs = Fields(config.path, group).section("input_activations")
    return _weights_scheme(config, Fields(config.path, weights), _rounds_tokens(config, inputs))


def _rounds_tokens(config: Fields, section: Mapping[str, Any] | None) -> bool:
    """Whether activations are to be rounded to 8 bits, dynamically, with a scale per token."""
    if section is None:
        return False
    inputs = Fields(config.path, section)
    wanted = (inputs.integer("num_bits"), inputs.text("type", "int"), inputs.text("strategy", "tensor"))
    return wanted == (8, "int", "token") and inputs.flag("symmetric", True) and inputs.flag("dynamic", False)


def _weights_scheme(config: Fields, weights: Fields, rounds_tokens: bool) -> CompressedScheme:
    bits, kind = weights.integer("num_bits"), weights.text("type", "int")
    container = config.text("format", "")
    is_packed = container == "pack-quantized"
    if container == "float-quantized" and kind == "float" and bits == 8:
        return _float_scheme(config, weights)
    if kind != "int" or (not is_packed and container not in ("int-quantized", "naive-quantized")):
        _refuse(config, f"compressed-tensors format {shown(container)} of type {shown(kind)}")
    _check_bits(config, bits, (4, 8) if is_packed else (8,))
    is_symmetric = weights.flag("symmetric", True)
    if not is_symmetric and bits != 4:
        _refuse(config, "asymmetric weights of 8 bits")
    strategy = weights.text("strategy", "tensor")
    if strategy not in ("tensor", "channel", "group"):
        _refuse(config, f"scales by {shown(strategy)}; supported are tensor, channel and group")
    actorder = weights.get("actorder")
    if actorder not in (None, False, "weight", "static"):
        _refuse(config, f"activation order {shown(actorder)}: inputs of a group must lie together")
    group_size = _group_size(weights) if strategy == "group" else None
    return CompressedScheme(
        "packed" if is_packed else "plain",
        bits,
        group_size,
        is_symmetric=is_symmetric,
        rounds_tokens=rounds_tokens and bits == 8 and group_size is None,
    )


def _float_scheme(config: Fields, weights: Fields) -> CompressedScheme:
    strategy = weights.text("strategy", "tensor")
    if strategy == "block":
        if weights.get("block_structure") != [SCALE_BLOCK, SCALE_BLOCK]:
            _refuse(config, f"blocks of {shown(weights.get('block_structure'))}; supported is [128, 128]")
        return CompressedScheme("fp8", 8, SCALE_BLOCK)
    if strategy not in ("tensor", "channel"):
        _refuse(config, f"float8 with scales by {shown(strategy)}; supported are tensor, channel and block")
    return CompressedScheme("fp8", 8, None)


def _check_bits(config: Fields, bits: int, supported: tuple[int, ...]) -> None:
    if bits not in supported:
        _refuse(config, f"weights of {bits} bits; supported are {' and '.join(map(str, supported))}")


def _group_size(config: Fields) -> int | None:
    size = config.get("group_size")
    if size in (None, -1):
        return None
    size = config.integer("group_size")
    if size % GROUP:
        _refuse(config, f"groups of {size} inputs; supported are multiples of {GROUP}, and -1")
    return size


def _lists_anything(config: Fields, key: str) -> bool:
    value: Mapping[str, Any] | None = config.section(key)
    return bool(value)
