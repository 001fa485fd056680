"""`ForwardBatch`: a scheduled step as tensors, ready for a model's forward pass.

Legend: T tokens in the step, R requests, S rows whose logits are wanted, B blocks in a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class GroupBatch:
    """What depends on the KV group."""

    slot_mapping: torch.Tensor  # [T] int64: block_id * block_size + offset of each new token
    block_tables: torch.Tensor  # [R, B] int64, padded with NULL_BLOCK_ID
    sliding_window: int | None


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Requests lie one after another; request r owns rows [query_start_loc[r], query_start_loc[r + 1])."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    query_start_loc: tuple[int, ...]  # R + 1
    seq_lens: tuple[int, ...]  # R: KV length of each request once this step is written
    groups: tuple[GroupBatch, ...]
    logits_indices: torch.Tensor  # [S] int64, rows of T
