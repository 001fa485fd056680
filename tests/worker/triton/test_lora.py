"""Adapters' rows in one launch against the reference's, adapter by adapter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pelton.weights.lora.adapter import LoraModule, LoraWeights
from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.ops import LoraSite
from pelton.worker.kernels.reference import lora as reference
from pelton.worker.kernels.triton.device import find_device
from pelton.worker.kernels.triton.lora import LoraBatch, TritonAdapter, add_lora

pytestmark = pytest.mark.torch

DEVICE = find_device()
SITES = [
    LoraSite((("q", 70), ("k", 33), ("v", 20)), 100),
    LoraSite((("o", 90),), 1500),
    LoraSite((("none", 8),), 16),
]


def tensor(*shape: int, seed: int) -> WeightTensor:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(0.2)
    return WeightTensor("w", shape, "F32", values.reshape(-1).view(np.uint8))


def module(num_outputs: int, num_inputs: int, rank: int, scale: float, seed: int) -> LoraModule:
    return LoraModule(tensor(rank, num_inputs, seed=seed), tensor(num_outputs, rank, seed=seed + 100), scale)


def weights(number: int) -> LoraWeights:
    """Of other ranks, and not all of the same modules."""
    modules = [
        {"q": module(70, 100, 8, 2.0, 1), "v": module(20, 100, 3, 0.5, 2), "o": module(90, 1500, 16, 1.0, 3)},
        {"k": module(33, 100, 40, -1.0, 4)},
        {"o": module(90, 1500, 5, 0.1, 5)},
    ]
    return LoraWeights(str(number), modules[number], None)


def rows_of(*groups: list[int]) -> list[np.ndarray]:
    return [np.array(group) for group in groups]


@pytest.mark.parametrize("site", range(len(SITES)))
def test_rows_of_several_adapters(site: int) -> None:
    own = rows_of([3, 0, 21], list(range(4, 21)), [2])
    x = torch.randn(24, SITES[site].num_inputs).to(DEVICE)
    y = torch.randn(24, SITES[site].num_outputs).to(DEVICE)
    ours = [TritonAdapter(weights(i), SITES, torch.float32, DEVICE) for i in range(3)]
    theirs = [reference.ReferenceAdapter(weights(i), SITES, torch.float32) for i in range(3)]
    expected = reference.add_lora(y.cpu().clone(), x.cpu(), site, tuple(zip(theirs, own, strict=True)))
    found = add_lora(y.clone(), x, site, tuple(zip(ours, own, strict=True)))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
    untouched = [1, 22, 23]
    assert torch.equal(found[untouched], y[untouched])
    assert ours[0].num_bytes > 0


def test_a_row_has_the_same_bits_in_any_company() -> None:
    adapters = [TritonAdapter(weights(i), SITES, torch.float32, DEVICE) for i in range(3)]
    x, y = torch.randn(40, 1500).to(DEVICE), torch.randn(40, 90).to(DEVICE)
    whole = add_lora(y.clone(), x, 1, ((adapters[0], np.arange(0, 30)), (adapters[2], np.arange(30, 40))))
    for row, adapter in ((0, adapters[0]), (17, adapters[0]), (33, adapters[2])):
        alone = add_lora(y[row : row + 1].clone(), x[row : row + 1], 1, ((adapter, np.array([0])),))
        assert torch.equal(alone[0], whole[row])


def test_a_batch_serves_all_sites() -> None:
    adapters = [TritonAdapter(weights(i), SITES, torch.bfloat16, DEVICE) for i in range(2)]
    own = tuple(zip(adapters, rows_of([0, 2], [1]), strict=True))
    batch = LoraBatch(own, DEVICE)
    for site, shape in enumerate(SITES):
        x = torch.randn(3, shape.num_inputs).to(DEVICE, torch.bfloat16)
        y = torch.randn(3, shape.num_outputs).to(DEVICE, torch.bfloat16)
        expected = add_lora(y.clone(), x, site, own)
        assert torch.equal(batch.add(y.clone(), x, site), expected)
        # The next step has the same adapters, the other way round.
        following = LoraBatch(tuple(reversed(own)), DEVICE, batch)
        assert not following.is_of(own)
        assert torch.equal(following.add(y.clone(), x, site), expected)
