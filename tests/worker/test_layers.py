"""Rotary tables and token embedding; the other layers are tested within their models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pelton.core.errors import UnsupportedModelError
from pelton.core.model_spec import RopeSpec
from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.ops import BACKENDS, make_kernels
from pelton.worker.layers.embedding import TokenEmbedding
from pelton.worker.layers.rotary import RotaryTable, inverse_frequencies

pytestmark = pytest.mark.torch


def test_rotary_table_grows_without_changing() -> None:
    spec = RopeSpec(theta=10_000.0, rotary_dim=6, attention_factor=1.5)
    table = RotaryTable(spec)
    positions = torch.tensor([0, 1, 4095, 17])
    before = table.lookup(positions, 4096)
    late = torch.tensor([4096, 20_000, 9_000])
    cos, sin = table.lookup(late, 20_001)
    angles = late.double()[:, None] * 10_000.0 ** (-torch.arange(0, 6, 2).double() / 6)
    # Angles in float32, as everywhere: at position 20,000 good to a thousandth.
    torch.testing.assert_close(cos.double(), 1.5 * angles.cos(), rtol=0, atol=3e-3)
    torch.testing.assert_close(sin.double(), 1.5 * angles.sin(), rtol=0, atol=3e-3)
    for old, new in zip(before, table.lookup(positions, 4096), strict=True):
        assert torch.equal(old, new)


def test_frequency_factors_divide() -> None:
    plain = inverse_frequencies(RopeSpec(theta=500.0, rotary_dim=8))
    divided = inverse_frequencies(RopeSpec(theta=500.0, rotary_dim=8, frequency_factors=(1.0, 2.0, 4.0, 8.0)))
    torch.testing.assert_close(plain, divided * torch.tensor([1.0, 2.0, 4.0, 8.0]))


def test_unknown_scaling_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="spiral"):
        inverse_frequencies(RopeSpec(theta=500.0, rotary_dim=8, scaling_kind="spiral"))


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_embedding_scale_is_rounded_to_the_dtype(backend: str) -> None:
    """Gemma multiplies by sqrt(hidden size) in its own dtype: 33.94 is 34 in bfloat16."""
    values = np.ones((2, 4), dtype=np.float32)
    table = WeightTensor("w", (2, 4), "F32", values.reshape(-1).view(np.uint8))
    for dtype, expected in ((torch.bfloat16, 34.0), (torch.float32, np.float32(1152**0.5))):
        embedding = TokenEmbedding(make_kernels(backend), table, dtype, 1152**0.5)
        assert embedding(torch.tensor([1])).tolist() == [[expected] * 4]
