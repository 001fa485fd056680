"""Linear layers: weights as files hold them, and their products with rows.

`linear` obeys law 3: a row's sums are cut and ordered as the weight says, whatever the other rows (`tiles.py`).
Without `batch_invariant` products go to cuBLASLt where that is expected to be faster; it chooses its order by the
number of rows.

Legend: S rows, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.triton.device import is_interpreted
from pelton.worker.kernels.triton.linear_kernels import product_kernel
from pelton.worker.kernels.triton.packed_kernels import expand_kernel, packed_product_kernel
from pelton.worker.kernels.triton.quantize_rows import quantize_rows
from pelton.worker.kernels.triton.stages import launch_with_stages
from pelton.worker.kernels.triton.tiles import MAX_SPLIT_ROWS, Tile, choose_tile, num_slices, slice_length
from pelton.worker.kernels.triton.weights import DenseWeight, PackedWeight, Weight, Weights, layout_of, make_weight

# From so many rows on a packed weight is expanded for cuBLASLt: writing and reading it in bfloat16 then costs less
# than a tenth of the product. Only without `batch_invariant`.
_MIN_EXPANDED_ROWS = 256
# Fewer rows are bound by memory, where the streaming kernel is expected to win. Only without `batch_invariant`.
_MIN_LIBRARY_ROWS = 64
_KINDS = {"float": 0, "int8": 1, "fp8": 2, "fp8_block": 3}


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Rows of a product by expert; see `moe.py`. Row p of y is of row p // share of x."""

    places: torch.Tensor  # int32 [row tiles * rows of a tile]: row of y, or num_rows where there is none
    experts: torch.Tensor  # int32 [row tiles]; -1: none
    num_rows: int  # of y
    share: int
    tile: Tile


class Scratch:
    """Partial sums, and the counters of programs that have left theirs. Grown while weights are loaded, so that
    captured graphs may hold its address; products of one device run one after another."""

    def __init__(self, device: torch.device) -> None:
        self.partial = torch.empty(0, dtype=torch.float32, device=device)
        self.counters = torch.zeros(0, dtype=torch.int32, device=device)
        self.row_kinds: set[str] = set()  # to which rows of activations are rounded for the weights loaded so far
        self._rounded: tuple[torch.Tensor, str, tuple[torch.Tensor, torch.Tensor]] | None = None

    def keep_rounded(self, x: torch.Tensor, kind: str, codes: tuple[torch.Tensor, torch.Tensor]) -> None:
        """What `quantize_rows` would make of x, for the next product of x, which must stay as it is."""
        self._rounded = (x, kind, codes)

    def forget_rounded(self) -> None:
        self._rounded = None

    def rounded(self, x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        kept = self._rounded
        if kept is not None and kept[0] is x and kept[1] == kind:
            return kept[2]
        return quantize_rows(x, kind)

    def reserve(self, weight: Weight) -> None:
        if isinstance(weight, DenseWeight) and weight.kind != "float":
            self.row_kinds.add(weight.kind)
        slices = num_slices(weight.kind, weight.num_outputs, weight.num_inputs)
        if slices == 1:
            return
        num_tiles = -(-weight.num_outputs // 64)
        num_values = slices * num_tiles * 64 * MAX_SPLIT_ROWS
        if len(self.partial) < num_values:
            self.partial = torch.empty(num_values, dtype=torch.float32, device=self.partial.device)
        if len(self.counters) < num_tiles:
            self.counters = torch.zeros(num_tiles, dtype=torch.int32, device=self.partial.device)


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """What `linear` takes."""

    weights: Weights
    scratch: Scratch
    batch_invariant: bool

    @property
    def num_outputs(self) -> int:
        return self.weights.num_outputs


class TritonLinearLoader:
    """Implements `ops.LinearLoader`."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        scratch: Scratch,
        *,
        batch_invariant: bool = True,
        quantization: str | None = None,
    ) -> None:
        """`quantization` (int8, fp8, fp8_block) rounds weights that are floats in the files."""
        self._dtype = dtype
        self._device = device
        self._scratch = scratch
        self._batch_invariant = batch_invariant
        self._quantization = quantization

    def load(self, tensors: Sequence[WeightTensor]) -> LinearWeight:
        parts = tuple(self.load_one(list(same)) for _, same in groupby(tensors, layout_of))
        return LinearWeight(Weights(parts), self._scratch, self._batch_invariant)

    def load_one(self, tensors: Sequence[WeightTensor]) -> Weight:
        """One matrix of tensors of one layout."""
        weight = make_weight(tensors, self._dtype, self._device, self._quantization)
        self._scratch.reserve(weight)
        return weight


def linear(x: torch.Tensor, weight: LinearWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [S, I] -> [S, O] in x's dtype."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    parts = weight.weights.parts
    if not weight.batch_invariant and len(parts) == 1 and (y := _by_library(x, parts[0], bias)) is not None:
        return y
    y = torch.empty((len(x), weight.num_outputs), dtype=x.dtype, device=x.device)
    first = 0
    for part in parts:
        last = first + part.num_outputs
        multiply(x, part, y[:, first:last], None if bias is None else bias[first:last], weight.scratch)
        first = last
    return y


def multiply(
    x: torch.Tensor,
    weight: Weight,
    y: torch.Tensor,
    bias: torch.Tensor | None,
    scratch: Scratch,
    plan: RowPlan | None = None,
) -> None:
    """x times `weight` into y; with a `plan`, of experts, each row with its own."""
    if not len(y):
        return
    x_scales = x
    if isinstance(weight, DenseWeight) and weight.kind != "float":
        x, x_scales = scratch.rounded(x, weight.kind)
    launch = _plan_launch(weight, len(y), plan)
    first = (x, weight.words if isinstance(weight, PackedWeight) else weight.matrix, y, y if bias is None else bias)
    shared: tuple[Any, ...] = (
        scratch.partial.view(torch.int32) if weight.kind == "int8" else scratch.partial,
        scratch.counters,
        y if plan is None else plan.places,
        y if plan is None else plan.experts,
        len(y),
        weight.num_outputs,
        weight.num_inputs,
        launch.num_row_tiles,
        x.stride(0),
        y.stride(0),
    )
    options = {**launch.options, "HAS_BIAS": bias is not None, "SHARE": 0 if plan is None else plan.share}
    if isinstance(weight, PackedWeight):
        kernel: Any = packed_product_kernel
        factors = (weight.scales, weight.scales if weight.minima is None else weight.minima)
        shared = (*shared, weight.scales.shape[-2])
        options |= {
            "BITS": weight.bits,
            "GROUP": weight.group,
            "PART": weight.part,
            "HAS_MINIMUM": weight.minima is not None,
            "SLICE": launch.slice_length // weight.block,
        }
    else:
        kernel = product_kernel
        factors = (x_scales, x_scales if weight.scales is None else weight.scales)
        options |= {"KIND": _KINDS[weight.kind], "SLICE": launch.slice_length, "BLOCK_K": launch.block_inputs}
    launch_with_stages(
        (weight.kind, launch.tile, x.dtype, options.get("BITS"), options.get("PART")),
        launch.tile.num_stages,
        lambda num_stages: kernel[launch.grid](*first, *factors, *shared, num_stages=num_stages, **options),
    )


@dataclass(frozen=True, slots=True)
class _Launch:
    grid: tuple[int, int]
    num_row_tiles: int
    slice_length: int  # inputs
    block_inputs: int
    tile: Tile
    options: dict[str, Any]


def _plan_launch(weight: Weight, num_rows: int, plan: RowPlan | None) -> _Launch:
    tile = choose_tile(weight.kind, num_rows) if plan is None else plan.tile
    num_row_tiles = -(-num_rows // tile.rows) if plan is None else len(plan.experts)
    slices = num_slices(weight.kind, weight.num_outputs, weight.num_inputs)
    is_split = plan is None and slices > 1 and num_rows <= MAX_SPLIT_ROWS
    block_inputs = weight.block if isinstance(weight, PackedWeight) else tile.inputs
    options = {
        "IS_SPLIT": is_split,
        "IS_EVEN": weight.num_inputs % block_inputs == 0,
        "BLOCK_R": tile.rows,
        "BLOCK_O": tile.outputs,
        "WIDEN": is_interpreted(),
        "num_warps": tile.num_warps,
        "enable_fp_fusion": False,  # fused where `tl.fma` says so: alike in every variant of a kernel
    }
    grid = (num_row_tiles * -(-weight.num_outputs // tile.outputs), slices if is_split else 1)
    length = slice_length(weight.kind, weight.num_outputs, weight.num_inputs)
    return _Launch(grid, num_row_tiles, length, block_inputs, tile, options)


def _by_library(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor | None:
    """The product by cuBLASLt, where it is expected to win."""
    if len(x) < _MIN_LIBRARY_ROWS or x.device.type != "cuda":
        return None
    bias = None if bias is None else bias.to(x.dtype)
    if isinstance(weight, PackedWeight):
        if len(x) < _MIN_EXPANDED_ROWS:
            return None
        return torch.nn.functional.linear(x, expand(weight, x.dtype), bias)
    if weight.kind == "float":
        return torch.nn.functional.linear(x, weight.matrix, bias)
    if weight.kind != "fp8" or weight.scales is None or x.dtype is not torch.bfloat16:
        return None
    codes, scales = quantize_rows(x, "fp8")
    return torch._scaled_mm(
        codes, weight.matrix.t(), scales[:, None], weight.scales[None, :], bias=bias, out_dtype=x.dtype
    )


def expand(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The dense matrix [O, I], rounded to `dtype`."""
    out = torch.empty((weight.num_outputs, weight.num_inputs), dtype=dtype, device=weight.words.device)
    expand_kernel[(len(weight.words), -(-weight.num_outputs // 64))](
        weight.words,
        weight.scales,
        weight.scales if weight.minima is None else weight.minima,
        out,
        weight.num_outputs,
        weight.num_inputs,
        len(weight.scales),
        BITS=weight.bits,
        GROUP=weight.group,
        HAS_MINIMUM=weight.minima is not None,
        BLOCK_O=64,
    )
    return out
