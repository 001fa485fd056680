"""What all attention layers of a KV group share in one step: which rows, slots and masks.

Law 3 for attention. The query rows of a request (one per token and query head of the same key-value head)
are cut into tiles of TILE_ROWS, its positions into chunks of CHUNK_TOKENS at fixed multiples. Every
product is one tile by one chunk, padded to that very shape, and chunks are summed in order. So a row
meets the same sums whoever else is in the batch, however the prompt was cut, and wherever a window starts.

Legend: G query heads per key-value head, P tiles, C = CHUNK_TOKENS, U units (one tile with one chunk).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pelton.worker.kernels.ops import AttentionShape

TILE_ROWS = 8
CHUNK_TOKENS = 128
_SMALL_BATCH_UNITS = 1024  # bounds the memory of gathered keys
_LARGE_BATCH_TILES = 64  # bounds the causal half that is computed in vain
_LARGE_BATCH_SCORES = 1 << 24  # elements


@dataclass(frozen=True, slots=True)
class SmallBatch:
    """Requests of one tile each (decodes, mostly), computed together.

    Sorted by number of chunks, most first; units in order of chunk, then request: chunk number j of its
    requests is the next `step_sizes[j]` units, and belongs to the first `step_sizes[j]` requests.
    """

    query_rows: torch.Tensor  # [R, K, TILE_ROWS] rows of query seen as [T * N, D]
    unit_requests: torch.Tensor  # [U]
    kv_rows: torch.Tensor  # [U, K, C] rows of a cache seen as [num_slots * K, D]
    mask: torch.Tensor  # [U, 1, TILE_ROWS, C] 0 or -inf
    step_sizes: list[int]


@dataclass(frozen=True, slots=True)
class TileBatch:
    """Consecutive tiles of one request with the chunks that they see."""

    query_rows: torch.Tensor  # [K, P, TILE_ROWS]
    kv_rows: torch.Tensor  # [K, number of chunks, C]
    masks: list[torch.Tensor | None]  # per chunk [P, TILE_ROWS, C]; None where all is seen


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    shape: AttentionShape
    small_batches: list[SmallBatch]
    tile_batches: list[TileBatch]


@dataclass(frozen=True, slots=True)
class _Request:
    index: int  # in the batch
    first_row: int  # of T
    num_tokens: int
    start: int  # position of its first token
    seq_len: int
    first_position: int  # earliest position that any of its tokens sees
    first_chunk: int
    num_chunks: int


def plan_attention(
    shape: AttentionShape,
    query_start_loc: Sequence[int],
    seq_lens: Sequence[int],
    block_tables: torch.Tensor,
) -> AttentionPlan:
    requests = []
    for index, seq_len in enumerate(seq_lens):
        num_tokens = query_start_loc[index + 1] - query_start_loc[index]
        start = seq_len - num_tokens
        first_position = 0 if shape.sliding_window is None else max(0, start - shape.sliding_window + 1)
        first_chunk = first_position // CHUNK_TOKENS
        num_chunks = (seq_len - 1) // CHUNK_TOKENS - first_chunk + 1
        first_row = query_start_loc[index]
        requests.append(_Request(index, first_row, num_tokens, start, seq_len, first_position, first_chunk, num_chunks))
    rows_per_token = shape.num_heads // shape.num_kv_heads
    small = []
    tile_batches = []
    for request in requests:
        if request.num_tokens * rows_per_token <= TILE_ROWS and request.num_chunks <= _SMALL_BATCH_UNITS:
            small.append(request)
        else:
            tile_batches += _tile_batches(shape, request, block_tables[request.index])
    small.sort(key=lambda request: -request.num_chunks)
    small_batches = []
    while small:
        num_units = num_taken = 0
        while num_taken < len(small) and num_units + small[num_taken].num_chunks <= _SMALL_BATCH_UNITS:
            num_units += small[num_taken].num_chunks
            num_taken += 1
        small_batches.append(_small_batch(shape, small[:num_taken], block_tables))
        small = small[num_taken:]
    return AttentionPlan(shape, small_batches, tile_batches)


def _small_batch(shape: AttentionShape, requests: list[_Request], block_tables: torch.Tensor) -> SmallBatch:
    facts = torch.tensor(
        [(r.index, r.first_row, r.num_tokens, r.start, r.seq_len, r.first_position, r.first_chunk) for r in requests]
    )
    indices, first_rows, num_tokens, starts, seq_lens, first_positions, first_chunks = facts.unsqueeze(-1).unbind(1)
    group = shape.num_heads // shape.num_kv_heads
    # A tile's spare rows repeat its last real one: same result, written to the same place.
    rows = torch.arange(TILE_ROWS).minimum(num_tokens * group - 1)  # [R, TILE_ROWS]
    row_positions = starts + rows // group
    query_rows = _per_head_rows(first_rows + rows // group, rows % group, shape).transpose(0, 1)

    step_sizes = [sum(request.num_chunks > step for request in requests) for step in range(requests[0].num_chunks)]
    unit_requests = torch.cat([torch.arange(size) for size in step_sizes])
    steps = torch.repeat_interleave(torch.tensor(step_sizes))
    chunks = first_chunks[unit_requests, 0] + steps
    positions = chunks.unsqueeze(-1) * CHUNK_TOKENS + torch.arange(CHUNK_TOKENS)  # [U, C]
    mask = _mask(row_positions[unit_requests], positions, shape.sliding_window).unsqueeze(1)
    # Slots outside the request may hold anything, NaN included: read a slot of its own instead.
    positions = positions.maximum(first_positions[unit_requests]).minimum(seq_lens[unit_requests] - 1)
    blocks = block_tables[indices[unit_requests], positions // shape.block_size]
    slots = blocks * shape.block_size + positions % shape.block_size
    heads = torch.arange(shape.num_kv_heads).view(1, -1, 1)
    kv_rows = slots.unsqueeze(1) * shape.num_kv_heads + heads
    return SmallBatch(query_rows.contiguous(), unit_requests, kv_rows, mask, step_sizes)


def _tile_batches(shape: AttentionShape, request: _Request, block_table: torch.Tensor) -> list[TileBatch]:
    group = shape.num_heads // shape.num_kv_heads
    num_rows = request.num_tokens * group
    num_tiles = -(-num_rows // TILE_ROWS)
    rows = torch.arange(num_tiles * TILE_ROWS).clamp_(max=num_rows - 1).view(num_tiles, TILE_ROWS)
    row_positions = request.start + rows // group
    query_rows = _per_head_rows(request.first_row + rows // group, rows % group, shape)

    positions = torch.arange(request.num_chunks * CHUNK_TOKENS) + request.first_chunk * CHUNK_TOKENS
    own = positions.clamp(request.first_position, request.seq_len - 1)
    slots = block_table[own // shape.block_size] * shape.block_size + own % shape.block_size
    heads = torch.arange(shape.num_kv_heads).view(-1, 1, 1)
    kv_rows = slots.view(1, request.num_chunks, CHUNK_TOKENS) * shape.num_kv_heads + heads
    positions = positions.view(request.num_chunks, CHUNK_TOKENS)

    window = shape.sliding_window
    batches = []
    most_tiles = _LARGE_BATCH_SCORES // (request.num_chunks * TILE_ROWS * CHUNK_TOKENS)
    step = min(_LARGE_BATCH_TILES, max(1, most_tiles))
    for tile in range(0, num_tiles, step):
        seen_by = row_positions[tile : tile + step]
        lowest, highest = int(seen_by[0, 0]), int(seen_by[-1, -1])
        first = 0 if window is None else max(0, lowest - window + 1) // CHUNK_TOKENS - request.first_chunk
        end = highest // CHUNK_TOKENS + 1 - request.first_chunk
        masks: list[torch.Tensor | None] = []
        for chunk in range(first, end):
            chunk_start = (request.first_chunk + chunk) * CHUNK_TOKENS
            is_seen = chunk_start + CHUNK_TOKENS - 1 <= lowest and (window is None or chunk_start > highest - window)
            masks.append(None if is_seen else _mask(seen_by, positions[chunk].expand(len(seen_by), -1), window))
        batches.append(TileBatch(query_rows[:, tile : tile + step].contiguous(), kv_rows[:, first:end], masks))
    return batches


def _per_head_rows(tokens: torch.Tensor, heads_in_group: torch.Tensor, shape: AttentionShape) -> torch.Tensor:
    """Rows [K, *tokens.shape] of query [T * N, D] for each token and its place in the group of heads."""
    group = shape.num_heads // shape.num_kv_heads
    kv_heads = torch.arange(shape.num_kv_heads).view(-1, *[1] * tokens.ndim)
    return (tokens * shape.num_kv_heads + kv_heads) * group + heads_in_group


def _mask(row_positions: torch.Tensor, key_positions: torch.Tensor, window: int | None) -> torch.Tensor:
    """0 where a row sees a key and -inf elsewhere: [P, TILE_ROWS], [P, C] -> float32 [P, TILE_ROWS, C]."""
    distance = row_positions.unsqueeze(-1) - key_positions.unsqueeze(-2)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
