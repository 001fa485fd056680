"""LoRA for the rows of several adapters in one launch each way: y += scale * B (A x).

Rows come by adapter, cut into tiles of one adapter each; matrices are found by address, so that adapters of any rank
lie where they were loaded. The sums over inputs are cut at the same places whatever the rows, one program for each
slice, and added up in order by the program that multiplies with B.

Legend: S rows, I inputs, O outputs, r rank, N padded rank of all parts of an adapter at a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from pelton.weights.dequantize import dequantize
from pelton.weights.lora.adapter import LoraWeights
from pelton.worker.forward_batch import Adapters
from pelton.worker.kernels.ops import LoraSite
from pelton.worker.kernels.triton.device import is_interpreted, send
from pelton.worker.kernels.triton.linear_kernels import dot

_ROWS = 16
_SLICE = 1024
_BLOCK_K = 128
_BLOCK_O = 64
_RANK_STEP = 16  # the least that a product of tiles takes


@triton.jit(do_not_specialize=["num_places", "most_rank"])
def shrink_kernel(
    x_ptr,
    a_table_ptr,  # [adapters]: addresses of A [N, I]
    rank_ptr,  # [adapters]: N
    row_ptr,  # [S']: rows of x, by adapter
    tile_ptr,  # [row tiles, 3]: adapter, first and last place in row_ptr
    z_ptr,  # [slices, S', most N] float32
    num_inputs,
    num_places,
    most_rank,
    x_stride,
    SLICE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    tile, slice_id, column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    adapter = tl.load(tile_ptr + tile * 3)
    places = tl.load(tile_ptr + tile * 3 + 1) + tl.arange(0, ROWS)
    row_mask = places < tl.load(tile_ptr + tile * 3 + 2)
    rank = tl.load(rank_ptr + adapter)
    if column * BLOCK_N < rank:
        rows = tl.load(row_ptr + places, mask=row_mask, other=0).to(tl.int64)
        a_ptr = tl.load(a_table_ptr + adapter).to(tl.pointer_type(x_ptr.dtype.element_ty))
        ranks = column * BLOCK_N + tl.arange(0, BLOCK_N)
        inputs = tl.arange(0, BLOCK_K)
        total = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
        for k in range(slice_id * SLICE, min(slice_id * SLICE + SLICE, num_inputs), BLOCK_K):
            in_range = (k + inputs < num_inputs)[None, :]
            x = tl.load(
                x_ptr + rows[:, None] * x_stride + k + inputs[None, :], mask=row_mask[:, None] & in_range, other=0.0
            )
            a = tl.load(a_ptr + ranks[:, None] * num_inputs + k + inputs[None, :], mask=in_range, other=0.0)
            total = dot(x, tl.trans(a), total, WIDEN)
        out = (slice_id * num_places + places)[:, None] * most_rank + ranks[None, :]
        tl.store(z_ptr + out, total, mask=row_mask[:, None])


@triton.jit(do_not_specialize=["num_places", "most_rank"])
def expand_kernel(
    z_ptr,
    y_ptr,
    b_table_ptr,  # [adapters, parts]: addresses of B [O', part's N]
    part_ptr,  # [adapters, parts, 4]: first and last column, first of its N, its N (0: the adapter has no such part)
    scale_ptr,  # [adapters, parts]
    row_ptr,
    tile_ptr,
    num_slices,
    num_places,
    most_rank,
    num_parts,
    y_stride,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDEN: tl.constexpr,
):
    tile, column, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    adapter = tl.load(tile_ptr + tile * 3)
    places = tl.load(tile_ptr + tile * 3 + 1) + tl.arange(0, ROWS)
    row_mask = places < tl.load(tile_ptr + tile * 3 + 2)
    index = adapter * num_parts + part
    first = tl.load(part_ptr + index * 4) + column * BLOCK_O
    last = tl.load(part_ptr + index * 4 + 1)
    first_rank = tl.load(part_ptr + index * 4 + 2)
    rank = tl.load(part_ptr + index * 4 + 3)
    if (rank > 0) & (first < last):
        rows = tl.load(row_ptr + places, mask=row_mask, other=0).to(tl.int64)
        element: tl.constexpr = y_ptr.dtype.element_ty
        b_ptr = tl.load(b_table_ptr + index).to(tl.pointer_type(element))
        outputs = column * BLOCK_O + tl.arange(0, BLOCK_O)
        ranks = tl.arange(0, BLOCK_N)
        output_mask = first + tl.arange(0, BLOCK_O) < last
        total = tl.zeros((ROWS, BLOCK_O), dtype=tl.float32)
        for n in range(0, rank, BLOCK_N):
            z = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
            rank_mask = (n + ranks < rank)[None, :]
            for slice_id in range(num_slices):
                found = (slice_id * num_places + places)[:, None] * most_rank + first_rank + n + ranks[None, :]
                z += tl.load(z_ptr + found, mask=row_mask[:, None] & rank_mask, other=0.0)
            b = tl.load(
                b_ptr + outputs[:, None] * rank + n + ranks[None, :], mask=output_mask[:, None] & rank_mask, other=0.0
            )
            total = dot(z.to(element), tl.trans(b), total, WIDEN)
        y_ptrs = y_ptr + rows[:, None] * y_stride + first + tl.arange(0, BLOCK_O)[None, :]
        mask = row_mask[:, None] & output_mask[None, :]
        y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptrs, (y + total * tl.load(scale_ptr + index)).to(element), mask=mask)


@dataclass(frozen=True, slots=True)
class _Part:
    """One matrix of a product."""

    b: torch.Tensor  # [O', N]
    scale: float
    first: int
    last: int
    first_rank: int


@dataclass(frozen=True, slots=True)
class _SiteWeights:
    a: torch.Tensor  # [N, I]: those of the parts one below another, each padded with zeros
    parts: tuple[_Part | None, ...]  # by module of the site


class TritonAdapter:
    """An adapter on the device."""

    def __init__(
        self, weights: LoraWeights, sites: Sequence[LoraSite], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.sites: dict[int, _SiteWeights] = {}
        self.num_bytes = 0
        for index, site in enumerate(sites):
            if any(name in weights.modules for name, _ in site.modules):
                self.sites[index] = self._load_site(weights, site, dtype, device)

    def _load_site(
        self, weights: LoraWeights, site: LoraSite, dtype: torch.dtype, device: torch.device
    ) -> _SiteWeights:
        rows: list[np.ndarray] = []
        parts: list[_Part | None] = []
        column = first_rank = 0
        for name, size in site.modules:
            module = weights.modules.get(name)
            if module is None:
                parts.append(None)
            else:
                padding = -module.rank % _RANK_STEP
                rows.append(np.pad(dequantize(module.a), ((0, padding), (0, 0))))
                b = torch.from_numpy(np.pad(dequantize(module.b), ((0, 0), (0, padding)))).to(device, dtype)
                parts.append(_Part(b, module.scale, column, column + size, first_rank))
                first_rank += module.rank + padding
                self.num_bytes += b.nbytes
            column += size
        a = torch.from_numpy(np.concatenate(rows)).to(device, dtype)
        self.num_bytes += a.nbytes
        return _SiteWeights(a, tuple(parts))


@dataclass(frozen=True, slots=True)
class _RowTiles:
    rows: torch.Tensor  # int32 [S']
    tiles: torch.Tensor  # int32 [row tiles, 3]


class LoraBatch:
    """The adapters of a step and their rows, on the device; made once for all sites of a forward pass."""

    def __init__(self, adapters: Adapters, device: torch.device, previous: LoraBatch | None = None) -> None:
        """What a `previous` batch of the same adapters has sent to the device is used again."""
        self._given = adapters
        adapters = tuple(sorted(adapters, key=lambda pair: id(pair[0])))  # in one order from step to step
        self._adapters = [adapter for adapter, _ in adapters]
        self._device = device
        self._tables: dict[int, dict[str, Any] | None] = {}
        if previous is not None and list(map(id, previous._adapters)) == list(map(id, self._adapters)):
            self._tables = previous._tables
        tiles, first = [], 0
        for index, (_, rows) in enumerate(adapters):
            last = first + len(rows)
            tiles += [(index, place, last) for place in range(first, last, _ROWS)]
            first = last
        self._num_places = first
        rows = np.concatenate([own for _, own in adapters]).astype(np.int32)
        self._rows = _RowTiles(self._to_device(rows), self._to_device(np.array(tiles, np.int32)))

    def is_of(self, adapters: Adapters) -> bool:
        """Whether it was made from this very tuple."""
        return self._given is adapters

    def add(self, y: torch.Tensor, x: torch.Tensor, site: int) -> torch.Tensor:
        """y [S, O], with what the adapters add at `site`. Writes over y."""
        table = self._table(site)
        if table is None:
            return y
        num_inputs = x.shape[1]
        num_slices = -(-num_inputs // _SLICE)
        num_tiles, most_rank = len(self._rows.tiles), table["most_rank"]
        z = torch.empty((num_slices, self._num_places, most_rank), dtype=torch.float32, device=x.device)
        shrink_kernel[(num_tiles, num_slices, most_rank // _RANK_STEP)](
            x,
            table["a"],
            table["ranks"],
            self._rows.rows,
            self._rows.tiles,
            z,
            num_inputs,
            self._num_places,
            most_rank,
            x.stride(0),
            SLICE=_SLICE,
            ROWS=_ROWS,
            BLOCK_N=_RANK_STEP,
            BLOCK_K=_BLOCK_K,
            WIDEN=is_interpreted(),
        )
        expand_kernel[(num_tiles, -(-table["most_outputs"] // _BLOCK_O), table["num_parts"])](
            z,
            y,
            table["b"],
            table["parts"],
            table["scales"],
            self._rows.rows,
            self._rows.tiles,
            num_slices,
            self._num_places,
            most_rank,
            table["num_parts"],
            y.stride(0),
            ROWS=_ROWS,
            BLOCK_O=_BLOCK_O,
            BLOCK_N=_RANK_STEP,
            WIDEN=is_interpreted(),
        )
        return y

    def _table(self, site: int) -> dict[str, Any] | None:
        if site not in self._tables:
            self._tables[site] = self._make_table([adapter.sites.get(site) for adapter in self._adapters])
        return self._tables[site]

    def _make_table(self, found: Sequence[_SiteWeights | None]) -> dict[str, Any] | None:
        """Addresses, ranks and columns by adapter. An adapter without the site has rank 0."""
        known = [weights for weights in found if weights is not None]
        if not known:
            return None
        num_parts = len(known[0].parts)
        ranks = np.zeros(len(found), np.int32)
        a = np.zeros(len(found), np.int64)
        b = np.zeros((len(found), num_parts), np.int64)
        parts = np.zeros((len(found), num_parts, 4), np.int32)
        scales = np.zeros((len(found), num_parts), np.float32)
        for i, weights in enumerate(found):
            if weights is None:
                continue
            ranks[i], a[i] = len(weights.a), weights.a.data_ptr()
            for j, part in enumerate(weights.parts):
                if part is not None:
                    b[i, j], scales[i, j] = part.b.data_ptr(), part.scale
                    parts[i, j] = part.first, part.last, part.first_rank, part.b.shape[1]
        return {
            "a": self._to_device(a),
            "b": self._to_device(b),
            "ranks": self._to_device(ranks),
            "parts": self._to_device(parts),
            "scales": self._to_device(scales),
            "most_rank": int(ranks.max()),
            "most_outputs": int((parts[..., 1] - parts[..., 0]).max()),
            "num_parts": num_parts,
        }

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return send(values, self._device)


def add_lora(y: torch.Tensor, x: torch.Tensor, site: int, adapters: Adapters) -> torch.Tensor:
    """See `ops.Kernels.add_lora`."""
    return LoraBatch(adapters, x.device).add(y, x, site)
