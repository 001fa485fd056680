"""Checksums of blocks, the same for bytes in numpy's arrays and in torch's tensors, at the speed of reading them.

A block's words of 8 bytes are laid out in rows; the sums of all rows and of all columns are hashed. Any change of one
word is seen, and so is one row or block in another's place: what this is for is memory that was cut short, or
written meanwhile, not a forger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np

ROW_WORDS = 512
_WORD_BYTES = 8
DIGEST_BYTES = 16


@contextmanager
def beside_steps(slots: Any) -> Iterator[None]:
    """What is done to `slots` within is done by the end of it, on a device without waiting for its steps."""
    if isinstance(slots, np.ndarray) or not slots.is_cuda:
        yield
        return
    import torch

    cuda: Any = torch.cuda
    stream = cuda.Stream(slots.device)
    with cuda.stream(stream):
        yield
    stream.synchronize()


def checksums(slots: Any, slot_ids: Sequence[int]) -> list[bytes]:
    """Of some slots of [num_slots, block_bytes] uint8."""
    sums = _sums_of_array if isinstance(slots, np.ndarray) else _sums_of_tensor
    return [blake2b(sums(slots[slot_id]), digest_size=DIGEST_BYTES).digest() for slot_id in slot_ids]


def _rows_end(num_bytes: int) -> int:
    """Bytes in whole rows; the rest is hashed as it is."""
    return num_bytes - num_bytes % (ROW_WORDS * _WORD_BYTES)


def _sums_of_array(block: Any) -> bytes:
    rows_end = _rows_end(len(block))
    rows = block[:rows_end].view(np.uint64).reshape(-1, ROW_WORDS)
    sums: bytes = rows.sum(0).tobytes() + rows.sum(1).tobytes() + block[rows_end:].tobytes()
    return sums


def _sums_of_tensor(block: Any) -> bytes:
    """Sums wrap around, signed or not: their bytes are the same."""
    import torch

    with beside_steps(block):
        rows_end = _rows_end(len(block))
        rows = block[:rows_end].view(torch.int64).view(-1, ROW_WORDS)
        parts = [rows.sum(0).view(torch.uint8), rows.sum(1).view(torch.uint8), block[rows_end:]]
        sums: bytes = torch.cat(parts).cpu().numpy().tobytes()
    return sums
