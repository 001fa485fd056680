"""What a step needs of the host, in one copy: numbers packed into a pinned buffer, and tensors that view the device's.

Legend: T tokens, padded where the step is; S rows whose logits are wanted; W words of an attention plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pelton.worker.forward_batch import ForwardBatch

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.int32]

_FIRST_BYTES = 1 << 20
_ALIGNMENT = 16
# The host fills one while the device may still be reading those of the steps in flight.
_NUM_STAGING = 3
NO_SLOT = -1


@dataclass(frozen=True, slots=True)
class StepTensors:
    """int32, all on the device. The last two belong to no captured step."""

    token_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    slot_mappings: tuple[torch.Tensor, ...]  # per KV group [T]; NO_SLOT: written nowhere
    plans: tuple[torch.Tensor, ...]  # per KV group [W]
    logits_rows: torch.Tensor  # [S]
    late_rows: torch.Tensor  # [T]: row of the last samples that is this token, or -1


class StepInputs:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._staging: list[_Staging] = []
        self._next = 0
        self.generation = 0  # of the device's buffer: tensors of an older one are gone
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    def load(self, batch: ForwardBatch, num_tokens: int, plans: Sequence[Words], late_rows: Ints | None) -> StepTensors:
        """Pad `batch` to `num_tokens` and begin to copy it to the device; later work on the stream sees it.

        Steps of equal `num_tokens` and sizes of `plans` have their tensors at the same addresses.
        """
        # What a captured step reads comes first, so that its place depends on those sizes alone.
        views = self._copy(
            [
                _padded(batch.token_ids, num_tokens, 0),
                _padded(batch.groups[0].rotation.positions, num_tokens, 0),
                *(_padded(group.slot_mapping, num_tokens, NO_SLOT) for group in batch.groups),
                *plans,
                batch.logits_indices,
                np.full(num_tokens, -1) if late_rows is None else _padded(late_rows, num_tokens, -1),
            ]
        )
        middle = 2 + len(batch.groups)
        return StepTensors(*views[:2], tuple(views[2:middle]), tuple(views[middle:-2]), *views[-2:])

    def _copy(self, fields: Sequence[npt.NDArray[Any]]) -> list[torch.Tensor]:
        offsets = [0]
        for field in fields:
            offsets.append(offsets[-1] + -(-field.size * 4 // _ALIGNMENT) * _ALIGNMENT)
        self._reserve(offsets[-1])
        staging = self._staging[self._next]
        self._next = (self._next + 1) % _NUM_STAGING
        staging.wait()
        views = []
        for field, offset in zip(fields, offsets, strict=False):
            end = offset + field.size * 4
            staging.bytes[offset:end].view(np.int32)[...] = field
            views.append(self._buffer[offset:end].view(torch.int32))
        staging.copy_to(self._buffer, offsets[-1])
        return views

    def _reserve(self, num_bytes: int) -> None:
        if num_bytes > len(self._buffer):
            size = max(_FIRST_BYTES, 1 << (num_bytes - 1).bit_length())
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._staging = [_Staging(size, self._device) for _ in range(_NUM_STAGING)]
            self.generation += 1


class _Staging:
    """One buffer on the host, and when the device has read it."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=on_cuda)
        self.bytes: npt.NDArray[np.uint8] = self._memory.numpy()
        self._read = torch.cuda.Event() if on_cuda else None
        self._is_used = False

    def wait(self) -> None:
        if self._read is not None and self._is_used:
            self._read.synchronize()

    def copy_to(self, buffer: torch.Tensor, num_bytes: int) -> None:
        buffer[:num_bytes].copy_(self._memory[:num_bytes], non_blocking=True)
        if self._read is not None:
            self._read.record()
            self._is_used = True


def _padded(values: Ints, size: int, filler: int) -> Ints:
    if len(values) == size:
        return values
    return np.concatenate([values, np.full(size - len(values), filler)])
