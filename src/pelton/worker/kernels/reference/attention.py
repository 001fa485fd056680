"""Attention over the paged cache, by the plan of `attention_plan.py`; always computed in float32.

Legend there. Queries are scaled before the product. The softmax takes its maximum over all chunks first, so
that chunks need no rescaling.
"""

from __future__ import annotations

import torch

from pelton.worker.kernels.reference.attention_plan import CHUNK_TOKENS, AttentionPlan, SmallBatch, TileBatch


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    num_tokens, num_heads, head_dim = query.shape
    rows = query.reshape(-1, head_dim).float() * scale
    keys, values = key_cache.flatten(0, 2), value_cache.flatten(0, 2)
    out = torch.empty(len(rows) + 1, head_dim)  # the last row takes what belongs to no token
    for small_batch in plan.small_batches:
        _attend_small(rows, keys, values, small_batch, softcap, out)
    for tile_batch in plan.tile_batches:
        for kv_head in range(plan.num_kv_heads):
            _attend_tiles(rows, keys, values, tile_batch, kv_head, softcap, out)
    return out[:-1].view(num_tokens, num_heads * head_dim).to(query.dtype)


def _attend_small(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: SmallBatch,
    softcap: float | None,
    out: torch.Tensor,
) -> None:
    """query [T * N, D] and out [T * N + 1, D] float32, keys and values [num_slots * K, D]."""
    num_kv_heads, num_requests, tile_rows = batch.rows.read.shape
    num_units = len(batch.unit_requests)
    tiles = query.index_select(0, batch.rows.read.flatten()).view(num_kv_heads, num_requests, tile_rows, -1)
    unit_keys = keys.index_select(0, batch.kv_rows).float().view(num_kv_heads * num_units, CHUNK_TOKENS, -1)
    scores = torch.bmm(tiles.index_select(1, batch.unit_requests).flatten(0, 1), unit_keys.mT)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.view(num_kv_heads, num_units, tile_rows, CHUNK_TOKENS).add_(batch.mask)

    chunk_maxima = scores.amax(-1, keepdim=True).split(batch.step_sizes, dim=1)
    maxima = chunk_maxima[0]
    for step, chunk_maximum in zip(batch.step_sizes[1:], chunk_maxima[1:], strict=True):
        torch.maximum(maxima[:, :step], chunk_maximum, out=maxima[:, :step])
    for step, chunk_scores in zip(batch.step_sizes, scores.split(batch.step_sizes, dim=1), strict=True):
        chunk_scores.sub_(maxima[:, :step])
    scores.exp_()
    sums = scores.sum(-1, keepdim=True).split(batch.step_sizes, dim=1)
    unit_values = values.index_select(0, batch.kv_rows).float().view(num_kv_heads * num_units, CHUNK_TOKENS, -1)
    outputs = torch.bmm(scores.flatten(0, 1), unit_values).view(num_kv_heads, num_units, tile_rows, -1)
    results = outputs.split(batch.step_sizes, dim=1)
    for step, chunk_sum, chunk_result in zip(batch.step_sizes[1:], sums[1:], results[1:], strict=True):
        sums[0][:, :step] += chunk_sum
        results[0][:, :step] += chunk_result
    out.index_copy_(0, batch.rows.write.flatten(), (results[0] / sums[0]).view(-1, out.shape[-1]))


def _attend_tiles(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: TileBatch,
    kv_head: int,
    softcap: float | None,
    out: torch.Tensor,
) -> None:
    """One key-value head of one request's tiles; tensors as in `_attend_small`."""
    _, num_tiles, tile_rows = batch.rows.read.shape
    num_chunks = len(batch.masks)
    kv_rows = batch.kv_rows[kv_head].flatten()
    tiles = query.index_select(0, batch.rows.read[kv_head].flatten()).view(num_tiles, tile_rows, -1)
    chunk_keys = keys.index_select(0, kv_rows).float().view(num_chunks, 1, CHUNK_TOKENS, -1)
    chunk_values = values.index_select(0, kv_rows).float().view(num_chunks, 1, CHUNK_TOKENS, -1)
    scores = torch.empty(num_chunks, num_tiles, tile_rows, CHUNK_TOKENS)
    for chunk_scores, one_keys, mask in zip(scores, chunk_keys, batch.masks, strict=True):
        torch.bmm(tiles, one_keys.expand(num_tiles, -1, -1).mT, out=chunk_scores)
        if softcap is not None:
            chunk_scores.div_(softcap).tanh_().mul_(softcap)
        if mask is not None:
            chunk_scores.add_(mask)
    scores.sub_(scores.amax(-1, keepdim=True).amax(0)).exp_()
    chunk_sums = scores.sum(-1, keepdim=True)
    total = chunk_sums[0]
    result = torch.bmm(scores[0], chunk_values[0].expand(num_tiles, -1, -1))
    for chunk in range(1, num_chunks):
        total += chunk_sums[chunk]
        result += torch.bmm(scores[chunk], chunk_values[chunk].expand(num_tiles, -1, -1))
    out.index_copy_(0, batch.rows.write[kv_head].flatten(), result.div_(total).view(-1, out.shape[-1]))
