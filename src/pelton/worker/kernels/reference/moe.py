"""Mixtures of experts on tensors: the rows of one expert after another.

Legend: T tokens, E experts, K experts of a token, H hidden size, F intermediate size of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.reference.activation import silu_mul
from pelton.worker.kernels.reference.linear import DenseLoader, linear


@dataclass(frozen=True, slots=True)
class ReferenceExperts:
    gate_up: tuple[torch.Tensor, ...]  # as `DenseLoader` makes them
    down: tuple[torch.Tensor, ...]


def make_experts(
    dtype: torch.dtype, gate_up: Sequence[Sequence[WeightTensor]], down: Sequence[WeightTensor]
) -> ReferenceExperts:
    loader = DenseLoader(dtype)
    return ReferenceExperts(
        tuple(loader.load(tensors) for tensors in gate_up), tuple(loader.load([tensor]) for tensor in down)
    )


def moe(
    x: torch.Tensor, logits: torch.Tensor, experts: ReferenceExperts, num_chosen: int, normalizes: bool
) -> torch.Tensor:
    """See `ops.Ops.moe`."""
    weights, chosen = route(logits, num_chosen, normalizes)
    results = x.new_empty((len(x), num_chosen, x.shape[1]))
    for expert in chosen.unique().tolist():
        tokens, slots = (chosen == expert).nonzero(as_tuple=True)
        gated = silu_mul(linear(x[tokens], experts.gate_up[expert]))
        results[tokens, slots] = linear(gated, experts.down[expert])
    total = torch.zeros_like(x, dtype=torch.float32)
    for slot in range(num_chosen):
        total += weights[:, slot, None] * results[:, slot].float()
    return total.to(x.dtype)


def route(logits: torch.Tensor, num_chosen: int, normalizes: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32 [T, K] and experts [T, K] of tokens with `logits` [T, E]: the likeliest first, equal ones by
    number, with their share of the softmax."""
    wide = logits.float()
    found, order = torch.sort(wide, dim=-1, descending=True, stable=True)
    greatest = found[:, :1]
    weights = (found[:, :num_chosen] - greatest).exp()
    whole = weights if normalizes else (wide - greatest).exp()
    return weights / whole.sum(dim=-1, keepdim=True), order[:, :num_chosen]
