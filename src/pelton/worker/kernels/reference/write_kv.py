"""New keys and values into their slots."""

from __future__ import annotations

import torch


def write_kv(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    # index_copy_ converts no dtypes, and the cache may be narrower than the activations.
    key_cache.flatten(0, 1).index_copy_(0, slot_mapping, keys.to(key_cache.dtype))
    value_cache.flatten(0, 1).index_copy_(0, slot_mapping, values.to(value_cache.dtype))
