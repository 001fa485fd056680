"""Mixtures of experts: routing, rows sorted by expert, products of each row with its expert, and their weighted sum.

Nothing of a step's routing comes to the host: the number of row tiles is bounded by sizes that it knows, and tiles
without rows return at once. A row's sums are those of the same weight alone (law 3), and its experts' results are added
in the order of their weights.

Legend: T tokens, E experts, K experts of a token, P = T K pairs, H hidden size, F intermediate size of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.triton.linear import RowPlan, Scratch, TritonLinearLoader, multiply
from pelton.worker.kernels.triton.tiles import Tile, choose_tile
from pelton.worker.kernels.triton.weights import Weight, stack_experts

_BLOCK = 1024


@triton.jit
def route_kernel(
    logits_ptr,  # [T, E]
    weight_ptr,  # [T, K]
    chosen_ptr,
    stride,
    num_experts,
    NUM_CHOSEN: tl.constexpr,
    NORMALIZES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The K likeliest experts of a token, equal ones by number, with their share of the softmax."""
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK_E)
    lowest: tl.constexpr = float("-inf")
    logits = tl.load(logits_ptr + token * stride + experts, mask=experts < num_experts, other=lowest).to(tl.float32)
    left = tl.where(logits == logits, logits, lowest)
    is_free = experts < num_experts
    greatest = tl.max(logits, axis=0)
    shares = tl.exp(logits - greatest)
    total = tl.sum(shares, axis=0)
    slots = tl.arange(0, BLOCK_K)
    weights = tl.zeros((BLOCK_K,), dtype=tl.float32)
    chosen = tl.zeros((BLOCK_K,), dtype=tl.int32)
    for slot in tl.static_range(NUM_CHOSEN):
        best = tl.max(tl.where(is_free, left, lowest), axis=0)
        expert = tl.min(tl.where(is_free & (left == best), experts, BLOCK_E), axis=0)
        share = tl.sum(tl.where(experts == expert, shares, 0.0), axis=0)
        weights = tl.where(slots == slot, share, weights)
        chosen = tl.where(slots == slot, expert, chosen)
        is_free = is_free & (experts != expert)
    if NORMALIZES:
        total = tl.sum(weights, axis=0)
    mask = slots < NUM_CHOSEN
    tl.store(weight_ptr + token * NUM_CHOSEN + slots, weights / total, mask=mask)
    tl.store(chosen_ptr + token * NUM_CHOSEN + slots, chosen, mask=mask)


@triton.jit(do_not_specialize=["num_pairs"])
def count_kernel(chosen_ptr, count_ptr, num_pairs, BLOCK: tl.constexpr):
    """Pairs of an expert."""
    expert = tl.program_id(0)
    counts = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, num_pairs, BLOCK):
        pairs = first + tl.arange(0, BLOCK)
        counts += (tl.load(chosen_ptr + pairs, mask=pairs < num_pairs, other=-1) == expert).to(tl.int32)
    tl.store(count_ptr + expert, tl.sum(counts, axis=0))


@triton.jit(do_not_specialize=["num_pairs"])
def place_kernel(
    chosen_ptr,
    count_ptr,
    place_ptr,  # [row tiles, ROWS]
    tile_ptr,  # [row tiles], of -1
    num_pairs,
    num_experts,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
):
    """An expert's pairs in their order, in row tiles of its own behind those of the experts before it."""
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(count_ptr + experts, mask=experts < num_experts, other=0)
    tiles = (counts + ROWS - 1) // ROWS
    first_tile = tl.sum(tl.where(experts < expert, tiles, 0), axis=0)
    last_tile = first_tile + tl.sum(tl.where(experts == expert, tiles, 0), axis=0)
    place = first_tile * ROWS
    for first in range(0, num_pairs, BLOCK):
        pairs = first + tl.arange(0, BLOCK)
        is_own = tl.load(chosen_ptr + pairs, mask=pairs < num_pairs, other=-1) == expert
        ranks = tl.cumsum(is_own.to(tl.int32), axis=0)
        tl.store(place_ptr + place + ranks - 1, pairs, mask=is_own)
        place += tl.sum(is_own.to(tl.int32), axis=0)
    empty = place + tl.arange(0, ROWS)
    tl.store(place_ptr + empty, tl.zeros((ROWS,), dtype=tl.int32) + num_pairs, mask=empty < last_tile * ROWS)
    for tile in range(first_tile, last_tile):
        tl.store(tile_ptr + tile, expert)


@triton.jit
def combine_kernel(x_ptr, weight_ptr, y_ptr, size, NUM_CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    """y [T, H] from x [T, K, H] and weights [T, K]."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in tl.static_range(NUM_CHOSEN):
        pair = token * NUM_CHOSEN + slot
        x = tl.load(x_ptr + pair * size + columns, mask=mask, other=0.0).to(tl.float32)
        total += x * tl.load(weight_ptr + pair)
    tl.store(y_ptr + token * size + columns, total.to(y_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class TritonExperts:
    """The experts of a layer: [E, 2 F, H] and [E, H, F]."""

    gate_up: Weight
    down: Weight
    num_experts: int
    scratch: Scratch


def load_experts(
    loader: TritonLinearLoader,
    gate_up: Sequence[Sequence[WeightTensor]],
    down: Sequence[WeightTensor],
    scratch: Scratch,
) -> TritonExperts:
    """Matrices by expert: gate and up projection, which must be of one layout, and down projection."""
    wide = stack_experts([loader.load_one(tensors) for tensors in gate_up])
    return TritonExperts(wide, stack_experts([loader.load_one([tensor]) for tensor in down]), len(down), scratch)


def route(logits: torch.Tensor, num_chosen: int, normalizes: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32 [T, K] and experts int32 [T, K] of tokens with `logits` [T, E], the likeliest first."""
    num_tokens, num_experts = logits.shape
    weights = torch.empty((num_tokens, num_chosen), dtype=torch.float32, device=logits.device)
    chosen = torch.empty((num_tokens, num_chosen), dtype=torch.int32, device=logits.device)
    route_kernel[(num_tokens,)](
        logits,
        weights,
        chosen,
        logits.stride(0),
        num_experts,
        num_chosen,
        normalizes,
        triton.next_power_of_2(num_experts),
        triton.next_power_of_2(num_chosen),
        num_warps=1,
    )
    return weights, chosen


def plan_rows(chosen: torch.Tensor, num_experts: int, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """(places int32 [row tiles * rows of a tile], experts int32 [row tiles]) of pairs `chosen` [T, K]."""
    num_pairs = chosen.numel()
    most_tiles = num_pairs // tile.rows + min(num_experts, num_pairs)
    places = torch.empty(most_tiles * tile.rows, dtype=torch.int32, device=chosen.device)
    tiles = torch.full((most_tiles,), -1, dtype=torch.int32, device=chosen.device)
    counts = torch.empty(num_experts, dtype=torch.int32, device=chosen.device)
    count_kernel[(num_experts,)](chosen, counts, num_pairs, _BLOCK)
    place_kernel[(num_experts,)](
        chosen, counts, places, tiles, num_pairs, num_experts, _BLOCK, triton.next_power_of_2(num_experts), tile.rows
    )
    return places, tiles


def moe(
    x: torch.Tensor,
    logits: torch.Tensor,
    experts: TritonExperts,
    num_chosen: int,
    normalizes: bool,
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """See `ops.Ops.moe`; `activation` makes [P, F] of gate and up [P, 2 F]."""
    num_tokens, size = x.shape
    y = torch.empty_like(x)
    if not num_tokens:
        return y
    weights, chosen = route(logits, num_chosen, normalizes)
    num_pairs = chosen.numel()
    tile = choose_tile(experts.gate_up.kind, -(-num_pairs // experts.num_experts))
    places, tiles = plan_rows(chosen, experts.num_experts, tile)
    wide = torch.empty((num_pairs, experts.gate_up.num_outputs), dtype=x.dtype, device=x.device)
    plan = RowPlan(places, tiles, num_pairs, num_chosen, tile)
    multiply(x, experts.gate_up, wide, None, experts.scratch, plan)
    narrow = torch.empty((num_pairs, size), dtype=x.dtype, device=x.device)
    plan = RowPlan(places, tiles, num_pairs, 1, tile)
    multiply(activation(wide), experts.down, narrow, None, experts.scratch, plan)
    block = min(triton.next_power_of_2(size), 1024)
    combine_kernel[(num_tokens, -(-size // block))](narrow, weights, y, size, num_chosen, block)
    return y
