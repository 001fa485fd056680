"""Rotary tables; the other layers are tested within their models."""

from __future__ import annotations

import numpy as np
import pytest

from pelton.core.errors import UnsupportedModelError
from pelton.core.model_spec import RopeSpec
from pelton.worker.layers.rotary import RotaryTable, inverse_frequencies


def test_rotary_table_grows_without_changing() -> None:
    spec = RopeSpec(theta=10_000.0, rotary_dim=6, attention_factor=1.5)
    table = RotaryTable(spec)
    positions = np.array([0, 1, 4095, 17])
    before = table.lookup(positions, 4096)
    late = np.array([4096, 20_000, 9_000])
    cos, sin = table.lookup(late, 20_001)
    angles = late[:, None] * 10_000.0 ** (-np.arange(0, 6, 2) / 6)
    # Angles in float32, as everywhere: at position 20,000 good to a thousandth.
    np.testing.assert_allclose(cos, 1.5 * np.cos(angles), rtol=0, atol=3e-3)
    np.testing.assert_allclose(sin, 1.5 * np.sin(angles), rtol=0, atol=3e-3)
    for old, new in zip(before, table.lookup(positions, 4096), strict=True):
        np.testing.assert_array_equal(old, new)


def test_frequency_factors_divide() -> None:
    plain = inverse_frequencies(RopeSpec(theta=500.0, rotary_dim=8))
    divided = inverse_frequencies(RopeSpec(theta=500.0, rotary_dim=8, frequency_factors=(1.0, 2.0, 4.0, 8.0)))
    np.testing.assert_allclose(plain, divided * [1.0, 2.0, 4.0, 8.0], rtol=1e-6)


def test_unknown_scaling_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="spiral"):
        inverse_frequencies(RopeSpec(theta=500.0, rotary_dim=8, scaling_kind="spiral"))
