"""`WeightTensor` -> float32, whole, by row range, or by single rows."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pelton.weights.gguf.blocks import decode_blocks
from pelton.weights.gguf.formats import FORMATS, TensorFormat
from pelton.weights.tensors import WeightTensor

# Values decoded at a time: few enough to stay in a core's cache between the passes over them.
CHUNK_VALUES = 1 << 16
# Below this a tensor is decoded by the calling thread.
MIN_VALUES_PER_THREAD = 1 << 18

F32 = npt.NDArray[np.float32]


def dequantize(
    tensor: WeightTensor,
    *,
    rows: slice | None = None,
    out: F32 | None = None,
    num_threads: int | None = None,
) -> F32:
    """Decode a tensor to float32 `[rows, ...]`, of `tensor.shape` unless `rows` picks a range of axis 0.

    `out`, contiguous and of the result's shape, receives the values instead of a new array, so that a
    caller can stream into memory of its own. Apart from the result only a few chunks are held.
    `num_threads` defaults to the cores this process may use. Raises `ValueError` for a wrong `out`.
    """
    if not tensor.shape:
        raise ValueError("a tensor without dimensions cannot be decoded")
    start, stop, step = (rows or slice(None)).indices(tensor.shape[0])
    if step != 1:
        raise ValueError("rows must be a range with step 1")
    shape = (max(stop - start, 0), *tensor.shape[1:])
    if out is None:
        out = np.empty(shape, dtype=np.float32)
    elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out must be a contiguous float32 array of shape {shape}")
    if out.size == 0:
        return out
    tensor_format = FORMATS[tensor.format]
    blocks = tensor.data.reshape(-1, tensor_format.block_bytes)
    if shape != tensor.shape:
        blocks_per_row, remainder = divmod(len(blocks), tensor.shape[0])
        if remainder:
            raise ValueError(f"rows of {tensor.name} are not whole blocks of {tensor_format.name}")
        blocks = blocks[start * blocks_per_row : stop * blocks_per_row]
    _decode(
        tensor_format,
        blocks,
        out.reshape(len(blocks), tensor_format.block_size),
        num_threads or num_cores(),
    )
    return out


def dequantize_rows(tensor: WeightTensor, row_ids: npt.NDArray[np.integer], out: F32 | None = None) -> F32:
    """Rows `row_ids` `[n]` of a matrix `[rows, columns]` as float32 `[n, columns]` (an embedding look-up).

    Raises `IndexError` for a row that is not there.
    """
    num_rows, num_columns = tensor.shape
    if len(row_ids) and not 0 <= int(np.min(row_ids)) <= int(np.max(row_ids)) < num_rows:
        raise IndexError(f"row ids of {tensor.name} must be from 0 to {num_rows - 1}")
    gathered = tensor.data.reshape(num_rows, -1)[row_ids].reshape(-1)
    picked = WeightTensor(tensor.name, (len(row_ids), num_columns), tensor.format, gathered)
    return dequantize(picked, out=out, num_threads=1)


def num_cores() -> int:
    """Cores this process may use; where the system cannot say (macOS), all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decode(tensor_format: TensorFormat, blocks: npt.NDArray[np.uint8], out: F32, num_threads: int) -> None:
    chunk = max(1, CHUNK_VALUES // tensor_format.block_size)

    def decode_range(first: int, last: int) -> None:
        for begin in range(first, last, chunk):
            end = min(begin + chunk, last)
            decode_blocks(tensor_format.name, blocks[begin:end], out[begin:end])

    num_threads = min(num_threads, -(-out.size // MIN_VALUES_PER_THREAD))
    if num_threads == 1:
        decode_range(0, len(blocks))
        return
    bounds = [len(blocks) * i // num_threads for i in range(num_threads + 1)]
    with ThreadPoolExecutor(num_threads) as pool:
        for future in [pool.submit(decode_range, *pair) for pair in pairwise(bounds)]:
            future.result()
