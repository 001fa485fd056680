"""Rotary tables: cos and sin of every position, for the scaling kinds of `RopeSpec`."""

from __future__ import annotations

import math

import torch

from pelton.core.errors import UnsupportedModelError
from pelton.core.model_spec import RopeSpec

# Positions are tabulated as they are first met, this many at least.
_FIRST_LENGTH = 4096


class RotaryTable:
    """cos and sin, float32 [positions, rotary_dim / 2]; grows by doubling."""

    def __init__(self, spec: RopeSpec) -> None:
        self._inverse_frequencies = inverse_frequencies(spec)
        self._attention_factor = spec.attention_factor
        self._cos, self._sin = self._tabulate(0, _FIRST_LENGTH)

    def lookup(self, positions: torch.Tensor, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, rotary_dim / 2] at `positions` [T], all below `num_positions`."""
        length = len(self._cos)
        if num_positions > length:
            cos, sin = self._tabulate(length, max(num_positions, 2 * length))
            self._cos, self._sin = torch.cat([self._cos, cos]), torch.cat([self._sin, sin])
        return self._cos[positions], self._sin[positions]

    def _tabulate(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.arange(start, end, dtype=torch.float32).unsqueeze(1) * self._inverse_frequencies
        return angles.cos().mul_(self._attention_factor), angles.sin().mul_(self._attention_factor)


def inverse_frequencies(spec: RopeSpec) -> torch.Tensor:
    """Angle per position of each pair of dimensions, float32 [rotary_dim / 2]."""
    exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim
    frequencies = 1.0 / spec.theta**exponents
    if spec.frequency_factors is not None:
        frequencies = frequencies / torch.tensor(spec.frequency_factors, dtype=torch.float32)
    if spec.scaling_kind == "none":
        return frequencies
    if spec.scaling_kind == "linear":
        return frequencies / spec.scaling_factor
    if spec.scaling_kind == "llama3":
        return _llama3(frequencies, spec)
    if spec.scaling_kind == "yarn":
        return _yarn(frequencies, spec)
    raise UnsupportedModelError(f"rope scaling {spec.scaling_kind!r} is not supported; none, linear, llama3, yarn are")


def _llama3(frequencies: torch.Tensor, spec: RopeSpec) -> torch.Tensor:
    """Long waves are stretched, short ones kept, those between blended (Llama 3.1 model card)."""
    turns = spec.original_max_position * frequencies / (2 * math.pi)  # over the original context
    kept = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    return _blend(frequencies, spec.scaling_factor, kept.clamp(0.0, 1.0))


def _yarn(frequencies: torch.Tensor, spec: RopeSpec) -> torch.Tensor:
    """YaRN, Peng et al., arXiv:2309.00071, section 3.2, with its ramp between whole dimensions."""
    half = len(frequencies)

    def dimension(turns: float) -> float:
        """Where a pair turns `turns` times over the original context."""
        return half * math.log(spec.original_max_position / (turns * 2 * math.pi)) / math.log(spec.theta)

    low = max(math.floor(dimension(spec.beta_fast)), 0)
    high = min(math.ceil(dimension(spec.beta_slow)), 2 * half - 1)
    ramp = (torch.arange(half, dtype=torch.float32) - low) / max(high - low, 0.001)
    return _blend(frequencies, spec.scaling_factor, 1.0 - ramp.clamp(0.0, 1.0))


def _blend(frequencies: torch.Tensor, factor: float, kept: torch.Tensor) -> torch.Tensor:
    return (1.0 - kept) * frequencies / factor + kept * frequencies
