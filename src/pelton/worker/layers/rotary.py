"""Rotary tables: cos and sin of every position, for the scaling kinds of `RopeSpec`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pelton.core.errors import UnsupportedModelError
from pelton.core.model_spec import ModelSpec, RopeSpec
from pelton.worker.forward_batch import Floats, Ints

_FIRST_LENGTH = 4096


class RotaryTable:
    """cos and sin, float32 [positions, rotary_dim / 2]; grows by doubling as positions are first met."""

    def __init__(self, spec: RopeSpec) -> None:
        self._inverse_frequencies = inverse_frequencies(spec)
        self._attention_factor = np.float32(spec.attention_factor)
        self._cos, self._sin = self._tabulate(0, _FIRST_LENGTH)

    def lookup(self, positions: Ints, num_positions: int) -> tuple[Floats, Floats]:
        """cos and sin [T, rotary_dim / 2] at `positions` [T], all below `num_positions`."""
        cos, sin = self.up_to(num_positions)
        if len(positions) == 1:  # a stream alone: nothing to gather, nor to let another thread in meanwhile
            first = int(positions[0])
            return cos[first : first + 1], sin[first : first + 1]
        return cos.take(positions, axis=0), sin.take(positions, axis=0)

    def up_to(self, num_positions: int) -> tuple[Floats, Floats]:
        """The whole tables, of `num_positions` or more."""
        while (length := len(self._cos)) < num_positions:
            cos, sin = self._tabulate(length, 2 * length)
            self._cos, self._sin = np.concatenate([self._cos, cos]), np.concatenate([self._sin, sin])
        return self._cos, self._sin

    def _tabulate(self, start: int, end: int) -> tuple[Floats, Floats]:
        angles = np.arange(start, end, dtype=np.float32)[:, None] * self._inverse_frequencies
        return np.cos(angles) * self._attention_factor, np.sin(angles) * self._attention_factor


@dataclass(frozen=True)
class Rotation:
    """The angles of a step's tokens, looked up when they are asked for: a device may have tables of its own."""

    table: RotaryTable
    positions: Ints  # [T]
    num_positions: int  # which exceeds them all

    @cached_property
    def cos_sin(self) -> tuple[Floats, Floats]:
        """float32 [T, rotary_dim / 2] each."""
        return self.table.lookup(self.positions, self.num_positions)


def rotary_tables(spec: ModelSpec) -> tuple[RotaryTable, ...]:
    """One per KV group; groups of one rotary embedding share a table."""
    table = RotaryTable(spec.rope)
    local = table if spec.rope_local is None else RotaryTable(spec.rope_local)
    return tuple(table if group.sliding_window is None else local for group in spec.kv_groups)


def inverse_frequencies(spec: RopeSpec) -> Floats:
    """Angle per position of each pair of dimensions, float32 [rotary_dim / 2]."""
    exponents = np.arange(0, spec.rotary_dim, 2, dtype=np.float32) / np.float32(spec.rotary_dim)
    frequencies: Floats = np.reciprocal(np.power(np.float32(spec.theta), exponents))
    if spec.frequency_factors is not None:
        frequencies /= np.array(spec.frequency_factors, dtype=np.float32)
    if spec.scaling_kind == "none":
        return frequencies
    if spec.scaling_kind == "linear":
        return frequencies / np.float32(spec.scaling_factor)
    if spec.scaling_kind == "llama3":
        return _llama3(frequencies, spec)
    if spec.scaling_kind == "yarn":
        return _yarn(frequencies, spec)
    raise UnsupportedModelError(f"rope scaling {spec.scaling_kind!r} is not supported; none, linear, llama3, yarn are")


def _llama3(frequencies: Floats, spec: RopeSpec) -> Floats:
    """Long waves are stretched, short ones kept, those between blended (Llama 3.1 model card)."""
    turns = frequencies * np.float32(spec.original_max_position / (2 * math.pi))  # over the original context
    kept = (turns - np.float32(spec.low_freq_factor)) / np.float32(spec.high_freq_factor - spec.low_freq_factor)
    return _blend(frequencies, spec.scaling_factor, kept.clip(0.0, 1.0))


def _yarn(frequencies: Floats, spec: RopeSpec) -> Floats:
    """YaRN, Peng et al., arXiv:2309.00071, section 3.2, with its ramp between whole dimensions."""
    half = len(frequencies)

    def dimension(turns: float) -> float:
        """Where a pair turns `turns` times over the original context."""
        return half * math.log(spec.original_max_position / (turns * 2 * math.pi)) / math.log(spec.theta)

    low = max(math.floor(dimension(spec.beta_fast)), 0)
    high = min(math.ceil(dimension(spec.beta_slow)), 2 * half - 1)
    ramp = (np.arange(half, dtype=np.float32) - np.float32(low)) / np.float32(max(high - low, 0.001))
    return _blend(frequencies, spec.scaling_factor, np.float32(1.0) - ramp.clip(0.0, 1.0))


def _blend(frequencies: Floats, factor: float, kept: Floats) -> Floats:
    one = np.float32(1.0)
    return (one - kept) * frequencies / np.float32(factor) + kept * frequencies
