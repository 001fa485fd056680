"""Mixtures of experts on the Triton backend: routing, the plan of rows, and the whole, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pelton.core.errors import UnsupportedModelError
from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.ops import make_kernels
from pelton.worker.kernels.reference.activation import silu_mul
from pelton.worker.kernels.reference.moe import make_experts as reference_experts
from pelton.worker.kernels.reference.moe import moe as reference_moe
from pelton.worker.kernels.reference.moe import route as reference_route
from pelton.worker.kernels.triton.device import find_device
from pelton.worker.kernels.triton.linear import Scratch, TritonLinearLoader
from pelton.worker.kernels.triton.moe import load_experts, moe, plan_rows, route
from pelton.worker.kernels.triton.tiles import choose_tile
from tests.worker.triton.test_linear import random_tensor

pytestmark = pytest.mark.torch

DEVICE = find_device()


def rows(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize(("num_experts", "num_chosen"), [(8, 2), (6, 3), (128, 8), (1, 1), (5, 5)])
@pytest.mark.parametrize("normalizes", [True, False])
def test_routing(num_experts: int, num_chosen: int, normalizes: bool) -> None:
    logits = rows(9, num_experts) * 3
    logits[3] = logits[3, 0]  # all alike: the first ones
    logits[4, : num_experts // 2] = float("-inf")
    weights, chosen = route(logits, num_chosen, normalizes)
    expected_weights, expected = reference_route(logits.cpu(), num_chosen, normalizes)
    assert torch.equal(chosen.long().cpu(), expected)
    torch.testing.assert_close(weights.cpu(), expected_weights, rtol=1e-5, atol=1e-7)


def test_routing_of_broken_logits_stays_within_the_experts() -> None:
    logits = torch.full((2, 6), float("nan"), device=DEVICE)
    _, chosen = route(logits, 3, True)
    assert chosen.ge(0).all()
    assert chosen.lt(6).all()


@pytest.mark.parametrize(("num_tokens", "num_experts", "num_chosen"), [(1, 8, 2), (40, 4, 3), (3, 128, 8), (700, 3, 2)])
def test_rows_lie_by_expert(num_tokens: int, num_experts: int, num_chosen: int) -> None:
    """Every pair once, in a tile of its expert, in order."""
    chosen = torch.stack([torch.randperm(num_experts)[:num_chosen] for _ in range(num_tokens)]).to(DEVICE, torch.int32)
    tile = choose_tile("float", 1)
    places, tiles = plan_rows(chosen, num_experts, tile)
    num_pairs, flat, seen = chosen.numel(), chosen.flatten(), []
    for index, expert in enumerate(tiles.tolist()):
        pairs = [p for p in places[index * tile.rows : (index + 1) * tile.rows].tolist() if expert >= 0]
        own = [p for p in pairs if p < num_pairs]
        assert all(flat[p] == expert for p in own)
        assert pairs[: len(own)] == own == sorted(own)
        seen += own
    assert sorted(seen) == list(range(num_pairs))


@pytest.mark.parametrize("name", ["F32", "Q4_0", "Q8_0", "INT8_CHANNEL", "fp8_block"])
def test_experts_are_those_of_the_reference(name: str) -> None:
    num_experts, size, inner = 3, 64, 96
    stored, quantization = ("F32", name) if name.startswith("fp8") else (name, None)
    gate_up = [[random_tensor(stored, inner, size, 10 * e + side) for side in (0, 1)] for e in range(num_experts)]
    down = [random_tensor(stored, size, inner, 10 * e + 2) for e in range(num_experts)]
    scratch = Scratch(DEVICE)
    loader = TritonLinearLoader(torch.float32, DEVICE, scratch, quantization=quantization)
    experts = load_experts(loader, gate_up, down, scratch)
    x, logits = rows(13, size) * 0.3, rows(13, num_experts, seed=2)
    y = moe(x, logits, experts, 2, True, silu_mul)
    expected = reference_moe(x.cpu(), logits.cpu(), reference_experts(torch.float32, gate_up, down), 2, True)
    assert float((y.cpu() - expected).norm() / expected.norm()) < (2e-3 if name in ("F32", "Q4_0", "Q8_0") else 0.2)
    for part in (x[:1], x[5:9]):
        found = moe(part, logits[:1] if len(part) == 1 else logits[5:9], experts, 2, True, silu_mul)
        start = 0 if len(part) == 1 else 5
        torch.testing.assert_close(found, y[start : start + len(part)], rtol=1e-5, atol=1e-6)
    assert moe(x[:0], logits[:0], experts, 2, True, silu_mul).shape == (0, size)


def test_experts_of_several_layouts_are_refused() -> None:
    scratch = Scratch(DEVICE)
    loader = TritonLinearLoader(torch.float32, DEVICE, scratch)
    gate_up = [[random_tensor("F32", 32, 64)] * 2, [random_tensor("Q4_0", 32, 64)] * 2]
    with pytest.raises(UnsupportedModelError, match="different ways"):
        load_experts(loader, gate_up, [random_tensor("F32", 64, 32)] * 2, scratch)


def test_native_kernels_say_that_they_have_none() -> None:
    tensor = WeightTensor("w", (4, 4), "F32", np.zeros(64, np.uint8))
    with pytest.raises(UnsupportedModelError, match="--kernel-backend reference"):
        make_kernels("native").make_experts([[tensor, tensor]], [tensor])
