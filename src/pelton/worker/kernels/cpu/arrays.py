"""What native kernels see of numpy's arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.cpu import pelton_cpu
from pelton.worker.kernels.ops import AttentionShape

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
# Of float32, or of the bits of bfloat16, which numpy does not have.
Cache = npt.NDArray[np.float32] | npt.NDArray[np.uint16]

KV_TYPES = {"bfloat16": np.uint16, "float32": np.float32}


def address(x: npt.NDArray[Any]) -> int:
    return x.ctypes.data


def is_bfloat16(cache: Cache) -> bool:
    return cache.dtype == np.uint16


def native_shape(shape: AttentionShape, bf16: bool) -> tuple[int, int, int, int, int, bool]:
    window = shape.sliding_window or 0
    return shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size, window, bf16


def embedding_table(table: WeightTensor, scale: float) -> pelton_cpu.EmbeddingTable:
    """A view of `table`, whose bytes must outlive it."""
    num_rows, width = table.shape
    return pelton_cpu.EmbeddingTable(table.format, address(table.data), table.data.nbytes, num_rows, width, scale)
