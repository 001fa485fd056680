"""Rotary position embedding, Su et al., arXiv:2104.09864, in the order of GPT-NeoX."""

from __future__ import annotations

import torch

from pelton.worker.kernels.reference.write_kv import write_kv


def split_heads(x: torch.Tensor, num_heads: int, num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads = x.view(len(x), num_heads + 2 * num_kv_heads, -1)
    query, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    return query, key, value


def rotate_and_store(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    write_kv(rotary(key, cos, sin), value, key_cache, value_cache, slot_mapping)
    return rotary(query, cos, sin)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out[..., :half] = first * cos - second * sin
    out[..., half : 2 * half] = second * cos + first * sin
    if x.shape[-1] > 2 * half:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out
