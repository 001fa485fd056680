"""`ForwardBatch`: a scheduled step as arrays on the host, ready for a `Program`.

Legend: T tokens in the step, R requests, S rows whose logits are wanted, B blocks in a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pelton.worker.layers.rotary import Rotation

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
# LoRA adapters in a backend's layout, each with the rows [.] that it changes; no row has two.
Adapters = tuple[tuple[Any, Ints], ...]


@dataclass(frozen=True, slots=True)
class GroupBatch:
    """What depends on the KV group."""

    slot_mapping: Ints  # [T]: block_id * block_size + offset of each new token
    block_tables: Ints  # [R, B], padded with NULL_BLOCK_ID
    rotation: Rotation  # of the tokens' positions; groups with one rotary embedding share it

    @property
    def cos(self) -> Floats:
        """[T, rotary_dim / 2]."""
        return self.rotation.cos_sin[0]

    @property
    def sin(self) -> Floats:
        return self.rotation.cos_sin[1]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Requests lie one after another; request r owns rows [query_start_loc[r], query_start_loc[r + 1])."""

    token_ids: Ints  # [T]
    query_start_loc: Ints  # [R + 1]
    seq_lens: Ints  # [R]: KV length of each request once this step is written
    groups: tuple[GroupBatch, ...]
    logits_indices: Ints  # [S], rows of T
    adapters: Adapters = ()


def adapters_among(adapters: Adapters, rows: Ints) -> Adapters:
    """`adapters` of all rows, as those of `rows` [S] alone, counted from 0 on."""
    found = ((adapter, np.flatnonzero(np.isin(rows, own))) for adapter, own in adapters)
    return tuple((adapter, own) for adapter, own in found if len(own))
