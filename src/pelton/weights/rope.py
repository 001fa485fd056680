"""Rotary settings of config.json and GGUF metadata as one `RopeSpec`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pelton.core.errors import UnsupportedModelError
from pelton.core.model_spec import RopeSpec
from pelton.weights.fields import Fields
from pelton.weights.mapped_file import shown

SUPPORTED_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeDefaults:
    """What rotary settings fall back to."""

    theta: float
    head_dim: int
    max_position: int
    partial_rotary_factor: float = 1.0


def rope_from_config(fields: Fields, defaults: RopeDefaults) -> RopeSpec:
    """From `rope_parameters`, or `rope_scaling` with the theta in `defaults` (Hugging Face's keys)."""
    theta = fields.number("rope_theta", defaults.theta)
    partial = fields.number("partial_rotary_factor", defaults.partial_rotary_factor)
    rotary_dim = int(defaults.head_dim * min(partial, 1.0))
    kind = fields.text("rope_type", fields.text("type", "default"))
    if kind not in SUPPORTED_KINDS:
        raise UnsupportedModelError(
            f"{fields.path}: rope scaling {shown(kind)} is not supported; supported are {', '.join(SUPPORTED_KINDS)}"
        )
    if kind == "default":
        return RopeSpec(theta, rotary_dim)
    factor = fields.number("factor")
    if kind == "linear":
        return RopeSpec(theta, rotary_dim, "linear", factor)
    original = fields.integer("original_max_position_embeddings", defaults.max_position)
    if kind == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        if high <= low:
            fields.fail("high_freq_factor", f"greater than low_freq_factor ({low})")
        return RopeSpec(
            theta,
            rotary_dim,
            "llama3",
            factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position=original,
        )
    if not fields.flag("truncate", True):
        raise UnsupportedModelError(f"{fields.path}: yarn with truncate = false is not supported")
    attention_factor = fields.optional_number("attention_factor")
    if attention_factor is None:
        attention_factor = _yarn_attention_factor(
            factor, fields.number("mscale", 0.0, positive=False), fields.number("mscale_all_dim", 0.0, positive=False)
        )
    return RopeSpec(
        theta,
        rotary_dim,
        "yarn",
        factor,
        original_max_position=original,
        attention_factor=attention_factor,
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
    )


def rope_from_gguf(fields: Fields, defaults: RopeDefaults, frequency_factors: tuple[float, ...] | None) -> RopeSpec:
    """From `<architecture>.rope.*`. llama.cpp takes a missing scaling type as linear."""
    theta = fields.number("rope.freq_base", defaults.theta)
    rotary_dim = fields.integer("rope.dimension_count", defaults.head_dim)
    kind = fields.text("rope.scaling.type", "linear")
    # Some converters write 0 for "no scaling".
    old_factor = fields.number("rope.scale_linear", 1.0, positive=False)
    factor = fields.number("rope.scaling.factor", old_factor, positive=False) or 1.0
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return RopeSpec(theta, rotary_dim, frequency_factors=frequency_factors)
    if kind == "linear":
        return RopeSpec(theta, rotary_dim, "linear", factor, frequency_factors=frequency_factors)
    if kind != "yarn":
        raise UnsupportedModelError(f"{fields.path}: rope scaling {shown(kind)} is not supported")
    scale = fields.number("rope.scaling.attn_factor", fields.number("rope.scaling.yarn_attn_factor", 1.0))
    return RopeSpec(
        theta,
        rotary_dim,
        "yarn",
        factor,
        original_max_position=fields.integer("rope.scaling.original_context_length", defaults.max_position),
        frequency_factors=frequency_factors,
        attention_factor=scale * _yarn_attention_factor(factor),
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
    )


def extended_length(architecture: str, max_position: int, rope: RopeSpec) -> int:
    """Longest context: what was trained, stretched by the scaling.

    Llama 3 and Gemma 3 files already give the stretched length; yarn and linear ones the original.
    """
    if rope.scaling_kind == "yarn":
        return max(max_position, int(rope.original_max_position * rope.scaling_factor))
    if rope.scaling_kind == "linear" and architecture != "gemma3":
        return int(max_position * max(rope.scaling_factor, 1.0))
    return max_position


def _yarn_attention_factor(factor: float, mscale: float = 0.0, mscale_all_dim: float = 0.0) -> float:
    """Scale of cos and sin, YaRN (arXiv 2309.00071) section 3.4; the two mscales are DeepSeek's."""

    def scale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)
