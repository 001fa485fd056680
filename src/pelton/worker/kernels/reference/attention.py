"""Attention over the paged cache, by the plan of `attention_plan.py`; always computed in float32."""

from __future__ import annotations

import torch

from pelton.worker.kernels.reference.attention_plan import (
    CHUNK_TOKENS,
    TILE_ROWS,
    AttentionPlan,
    SmallBatch,
    TileBatch,
)


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    num_tokens, num_heads, head_dim = query.shape
    query_rows = query.reshape(-1, head_dim).float() * scale
    keys, values = key_cache.flatten(0, 2), value_cache.flatten(0, 2)
    out = torch.empty_like(query_rows)
    for small_batch in plan.small_batches:
        _attend_small(query_rows, keys, values, small_batch, softcap, out)
    for tile_batch in plan.tile_batches:
        for kv_head in range(plan.shape.num_kv_heads):
            _attend_tiles(query_rows, keys, values, tile_batch, kv_head, softcap, out)
    return out.view(num_tokens, num_heads * head_dim).to(query.dtype)


def _attend_small(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: SmallBatch,
    softcap: float | None,
    out: torch.Tensor,
) -> None:
    """query and out [T * N, D] float32, keys and values [num_slots * K, D]."""
    num_requests, num_kv_heads, _ = batch.query_rows.shape
    num_units = len(batch.unit_requests)
    tile_rows = batch.query_rows.flatten()
    tiles = query.index_select(0, tile_rows).view(num_requests, -1).index_select(0, batch.unit_requests)
    scores = torch.bmm(
        tiles.view(num_units * num_kv_heads, TILE_ROWS, -1),
        keys.index_select(0, batch.kv_rows.flatten()).float().view(num_units * num_kv_heads, CHUNK_TOKENS, -1).mT,
    )
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.view(num_units, num_kv_heads, TILE_ROWS, CHUNK_TOKENS).add_(batch.mask)

    steps = scores.split(batch.step_sizes)
    chunk_maxima = scores.amax(-1, keepdim=True).split(batch.step_sizes)
    maxima = chunk_maxima[0].clone()
    for step, chunk_maximum in zip(batch.step_sizes, chunk_maxima, strict=True):
        torch.maximum(maxima[:step], chunk_maximum, out=maxima[:step])
    for step, chunk_scores in zip(batch.step_sizes, steps, strict=True):
        chunk_scores.sub_(maxima[:step])
    scores.exp_()
    chunk_sums = scores.sum(-1, keepdim=True)
    chunk_outs = torch.bmm(
        scores.view(num_units * num_kv_heads, TILE_ROWS, CHUNK_TOKENS),
        values.index_select(0, batch.kv_rows.flatten()).float().view(num_units * num_kv_heads, CHUNK_TOKENS, -1),
    ).view(num_units, num_kv_heads, TILE_ROWS, -1)
    total, result = chunk_sums[:num_requests], chunk_outs[:num_requests]
    first = num_requests
    for step in batch.step_sizes[1:]:
        total[:step] += chunk_sums[first : first + step]
        result[:step] += chunk_outs[first : first + step]
        first += step
    out.index_copy_(0, tile_rows, result.div_(total).view(len(tile_rows), -1))


def _attend_tiles(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: TileBatch,
    kv_head: int,
    softcap: float | None,
    out: torch.Tensor,
) -> None:
    """One key-value head of one request's tiles; arguments as in `_attend_small`."""
    num_chunks = len(batch.masks)
    tile_rows = batch.query_rows[kv_head].flatten()
    kv_rows = batch.kv_rows[kv_head].flatten()
    tiles = query.index_select(0, tile_rows).view(-1, TILE_ROWS, query.shape[-1])
    num_tiles = len(tiles)
    scores = torch.empty(num_chunks, num_tiles, TILE_ROWS, CHUNK_TOKENS)
    chunk_keys = keys.index_select(0, kv_rows).float().view(num_chunks, CHUNK_TOKENS, -1)
    for chunk, mask in enumerate(batch.masks):
        torch.bmm(tiles, chunk_keys[chunk].expand(num_tiles, -1, -1).mT, out=scores[chunk])
        if softcap is not None:
            scores[chunk].div_(softcap).tanh_().mul_(softcap)
        if mask is not None:
            scores[chunk].add_(mask)
    maxima = scores.amax(-1, keepdim=True).amax(0)
    scores.sub_(maxima).exp_()
    chunk_sums = scores.sum(-1, keepdim=True)
    chunk_values = values.index_select(0, kv_rows).float().view(num_chunks, CHUNK_TOKENS, -1)
    total = chunk_sums[0]
    result = torch.bmm(scores[0], chunk_values[0].expand(num_tiles, -1, -1))
    for chunk in range(1, num_chunks):
        total += chunk_sums[chunk]
        result += torch.bmm(scores[chunk], chunk_values[chunk].expand(num_tiles, -1, -1))
    out.index_copy_(0, tile_rows, result.div_(total).view(len(tile_rows), -1))
