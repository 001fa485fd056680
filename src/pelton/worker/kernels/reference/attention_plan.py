"""What all attention layers of a KV group share in one step: which rows, slots and masks.

Law 3 for attention. The positions of a request are cut at fixed multiples, into tiles of queries (with all
query heads of one key-value head) and into chunks of keys. Every product is one whole tile by one whole
chunk, unused rows and slots included, so it has one shape, a token has one place in it, and chunks are
summed in order. A row thus meets the same sums whoever else is in the batch, however the prompt was
cut, and wherever a window starts, even where a matrix product treats its last rows differently.

Legend: G query heads per key-value head, P tiles, M rows of a tile (tokens times G), C = CHUNK_TOKENS,
U units (one tile with one chunk).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pelton.worker.kernels.ops import AttentionShape

CHUNK_TOKENS = 128
_TILE_ROWS = 8  # at most, if a single token has no more
_SMALL_BATCH_UNITS = 1024  # bounds the memory of gathered keys
_LARGE_BATCH_TILES = 64  # bounds the causal half that is computed in vain
_LARGE_BATCH_SCORES = 1 << 24  # elements


@dataclass(frozen=True, slots=True)
class TileRows:
    """Where the rows of tiles come from and go to: rows of query and result seen as [T * N, D]."""

    read: torch.Tensor  # [K, P, M]
    write: torch.Tensor  # [K, P, M]; T * N, one past the end, for rows that are not of this step


@dataclass(frozen=True, slots=True)
class SmallBatch:
    """Requests of one tile each (decodes, mostly), computed together.

    Sorted by number of chunks, most first; units in order of chunk, then request: chunk number j of its
    requests is the next `step_sizes[j]` units, and belongs to the first `step_sizes[j]` requests.
    """

    rows: TileRows  # P is R
    unit_requests: torch.Tensor  # [U]
    kv_rows: torch.Tensor  # [K * U * C] rows of a cache seen as [num_slots * K, D]
    mask: torch.Tensor  # [U, M, C] 0 or -inf
    step_sizes: list[int]


@dataclass(frozen=True, slots=True)
class TileBatch:
    """Consecutive tiles of one request with the chunks that they see."""

    rows: TileRows
    kv_rows: torch.Tensor  # [K, number of chunks, C]
    masks: list[torch.Tensor | None]  # per chunk [P, M, C]; None where all is seen


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    num_kv_heads: int
    small_batches: list[SmallBatch]
    tile_batches: list[TileBatch]


@dataclass(frozen=True, slots=True)
class _Request:
    index: int  # in the batch
    first_token: int  # of T
    start: int  # position of its first token
    seq_len: int
    first_position: int  # earliest position that any of its tokens sees
    first_chunk: int
    num_chunks: int


def plan_attention(
    shape: AttentionShape,
    query_start_loc: npt.NDArray[np.int64],
    seq_lens: npt.NDArray[np.int64],
    block_tables: torch.Tensor,
) -> AttentionPlan:
    tile_tokens = _tile_tokens(shape)
    starts: list[int] = query_start_loc.tolist()
    num_tokens = starts[-1]
    small: list[_Request] = []
    tile_batches: list[TileBatch] = []
    for index, seq_len in enumerate(seq_lens.tolist()):
        first_token = starts[index]
        start = seq_len - (starts[index + 1] - first_token)
        first_position = 0 if shape.sliding_window is None else max(0, start - shape.sliding_window + 1)
        first_chunk = first_position // CHUNK_TOKENS
        num_chunks = (seq_len - 1) // CHUNK_TOKENS - first_chunk + 1
        request = _Request(index, first_token, start, seq_len, first_position, first_chunk, num_chunks)
        if start // tile_tokens == (seq_len - 1) // tile_tokens and num_chunks <= _SMALL_BATCH_UNITS:
            small.append(request)
        else:
            tile_batches += _tile_batches(shape, request, num_tokens, block_tables[index])
    small.sort(key=lambda request: -request.num_chunks)
    small_batches = []
    while small:
        num_units = num_taken = 0
        while num_taken < len(small) and num_units + small[num_taken].num_chunks <= _SMALL_BATCH_UNITS:
            num_units += small[num_taken].num_chunks
            num_taken += 1
        small_batches.append(_small_batch(shape, small[:num_taken], num_tokens, block_tables))
        small = small[num_taken:]
    return AttentionPlan(shape.num_kv_heads, small_batches, tile_batches)


def _small_batch(
    shape: AttentionShape, requests: list[_Request], num_tokens: int, block_tables: torch.Tensor
) -> SmallBatch:
    facts = torch.tensor(
        [(r.index, r.first_token, r.start, r.seq_len, r.first_position, r.first_chunk) for r in requests]
    )
    indices, first_tokens, starts, seq_lens, first_positions, first_chunks = facts.unsqueeze(-1).unbind(1)
    tiles = starts // _tile_tokens(shape)
    rows, row_positions = _tile_rows(shape, tiles, starts, seq_lens, starts - first_tokens, num_tokens)

    step_sizes = [sum(request.num_chunks > step for request in requests) for step in range(requests[0].num_chunks)]
    unit_requests = torch.cat([torch.arange(size) for size in step_sizes])
    steps = torch.repeat_interleave(torch.tensor(step_sizes)).unsqueeze(-1)
    positions = (first_chunks[unit_requests] + steps) * CHUNK_TOKENS + torch.arange(CHUNK_TOKENS)  # [U, C]
    mask = _mask(row_positions[unit_requests], positions, shape.sliding_window)
    # Slots outside the request may hold anything, NaN included: read a slot of its own instead.
    own = positions.maximum(first_positions[unit_requests]).minimum(seq_lens[unit_requests] - 1)
    blocks = block_tables[indices[unit_requests], own // shape.block_size]
    return SmallBatch(rows, unit_requests, _kv_rows(shape, blocks, own).flatten(), mask, step_sizes)


def _tile_batches(
    shape: AttentionShape, request: _Request, num_tokens: int, block_table: torch.Tensor
) -> list[TileBatch]:
    tile_tokens = _tile_tokens(shape)
    group = shape.num_heads // shape.num_kv_heads
    tiles = torch.arange(request.start // tile_tokens, (request.seq_len - 1) // tile_tokens + 1).unsqueeze(-1)
    start, seq_len = torch.tensor(request.start), torch.tensor(request.seq_len)
    rows, row_positions = _tile_rows(shape, tiles, start, seq_len, start - request.first_token, num_tokens)

    first_slot = request.first_chunk * CHUNK_TOKENS
    positions = torch.arange(first_slot, first_slot + request.num_chunks * CHUNK_TOKENS).view(-1, CHUNK_TOKENS)
    own = positions.clamp(request.first_position, request.seq_len - 1)
    kv_rows = _kv_rows(shape, block_table[own // shape.block_size], own)

    window = shape.sliding_window
    batches = []
    most_tiles = _LARGE_BATCH_SCORES // (request.num_chunks * tile_tokens * group * CHUNK_TOKENS)
    step = min(_LARGE_BATCH_TILES, max(1, most_tiles))
    for tile in range(0, len(tiles), step):
        seen_by = row_positions[tile : tile + step]
        lowest, highest = int(seen_by[0, 0]), int(seen_by[-1, -1])
        first = 0 if window is None else max(0, lowest - window + 1) // CHUNK_TOKENS - request.first_chunk
        end = highest // CHUNK_TOKENS + 1 - request.first_chunk
        masks: list[torch.Tensor | None] = []
        for chunk in range(first, end):
            chunk_start = first_slot + chunk * CHUNK_TOKENS
            is_seen = chunk_start + CHUNK_TOKENS - 1 <= lowest and (window is None or chunk_start > highest - window)
            masks.append(None if is_seen else _mask(seen_by, positions[chunk].expand(len(seen_by), -1), window))
        part = TileRows(rows.read[:, tile : tile + step], rows.write[:, tile : tile + step])
        batches.append(TileBatch(part, kv_rows[:, first:end], masks))
    return batches


def _tile_tokens(shape: AttentionShape) -> int:
    return max(1, _TILE_ROWS * shape.num_kv_heads // shape.num_heads)


def _tile_rows(
    shape: AttentionShape,
    tiles: torch.Tensor,
    starts: torch.Tensor,
    seq_lens: torch.Tensor,
    offsets: torch.Tensor,
    num_tokens: int,
) -> tuple[TileRows, torch.Tensor]:
    """Rows of `tiles` [P, 1], and their positions [P, M]. starts, seq_lens, offsets: [P, 1] or one for all.

    A token at position p, of [start, seq_len), is token p - offset of the batch. Rows of other positions
    take the place of the nearest token.
    """
    group = shape.num_heads // shape.num_kv_heads
    row = torch.arange(_tile_tokens(shape) * group)
    positions = tiles * _tile_tokens(shape) + row // group
    own = positions.maximum(starts).minimum(seq_lens - 1)
    kv_heads = torch.arange(shape.num_kv_heads).view(-1, 1, 1)
    read = ((own - offsets) * shape.num_kv_heads + kv_heads) * group + row % group
    write = torch.where(positions == own, read, num_tokens * shape.num_heads)
    return TileRows(read, write), own


def _kv_rows(shape: AttentionShape, blocks: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rows [K, ..., C] of a cache seen as [num_slots * K, D], for `positions` [..., C] in `blocks`."""
    slots = blocks * shape.block_size + positions % shape.block_size
    return slots * shape.num_kv_heads + torch.arange(shape.num_kv_heads).view(-1, 1, 1)


def _mask(row_positions: torch.Tensor, key_positions: torch.Tensor, window: int | None) -> torch.Tensor:
    """0 where a row sees a key and -inf elsewhere: [P, M], [P, C] -> float32 [P, M, C]."""
    distance = row_positions.unsqueeze(-1) - key_positions.unsqueeze(-2)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
