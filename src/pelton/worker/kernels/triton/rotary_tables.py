"""The rotary tables on the device. Legend: T tokens, P positions, r rotated dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pelton.worker.layers.rotary import RotaryTable, Rotation


class RotaryTables:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: dict[RotaryTable, torch.Tensor] = {}  # float32 [P, 2, r / 2]
        self.generation = 0  # grows whenever a table has moved

    def reserve(self, rotations: Sequence[Rotation]) -> None:
        """Copy what is not there yet; tables grow by doubling, so seldom."""
        for rotation in rotations_by_table(rotations).values():
            known = self._tables.get(rotation.table)
            if known is None or len(known) < rotation.num_positions:
                cos, sin = rotation.table.up_to(rotation.num_positions)
                self._tables[rotation.table] = torch.from_numpy(np.stack([cos, sin], axis=1)).to(self._device)
                self.generation += 1

    def lookup(self, rotations: Sequence[Rotation], positions: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """cos and sin [T, r / 2] at `positions` [T], for each of `rotations`."""
        found = {table: self._tables[table].index_select(0, positions) for table in rotations_by_table(rotations)}
        return [(found[rotation.table][:, 0], found[rotation.table][:, 1]) for rotation in rotations]


def rotations_by_table(rotations: Sequence[Rotation]) -> dict[RotaryTable, Rotation]:
    return {rotation.table: rotation for rotation in rotations}
