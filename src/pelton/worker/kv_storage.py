"""`KVStorage`: the memory of all KV blocks. Bookkeeping of blocks is the engine's, not done here."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from pelton.core.model_spec import ModelSpec


class KVStorage:
    """One pool for all KV groups: a block id is used by one group at a time, for all its layers.

    Memory is reserved on construction, but touched (so really taken) only as blocks are written; what
    an unwritten block holds is undefined. Block 0 is the null block, which nobody writes or reads.
    """

    def __init__(
        self, spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._places = {
            layer_id: (group_index, slot)
            for group_index, group in enumerate(spec.kv_groups)
            for slot, layer_id in enumerate(group.layer_ids)
        }
        # [layer slots, keys and values, num_blocks, block_size, K, D]
        self._data = torch.empty(
            spec.num_layers_per_kv_group,
            2,
            num_blocks,
            block_size,
            spec.num_kv_heads,
            spec.head_dim,
            dtype=dtype,
            device=device,
        )

    @property
    def num_bytes(self) -> int:
        return self._data.nbytes

    def layer_cache(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, each [num_blocks, block_size, num_kv_heads, head_dim]."""
        keys, values = self._data[self._places[layer_id][1]]
        return keys, values

    def group_of_layer(self, layer_id: int) -> int:
        """Index into `ForwardBatch.groups` and `ModelSpec.kv_groups`."""
        return self._places[layer_id][0]

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy block `source` over block `destination` in every layer, pair after pair."""
        for source, destination in pairs:
            self._data[:, :, destination].copy_(self._data[:, :, source])
