"""Quantized matrices as whole numbers, scales and minima, whatever blocks they came in.

A weight is scale * (code - zero) - minimum, with one scale and minimum for each group of inputs. The codes are the
file's; scales of K-quants, a product of two numbers there, are rounded to float32 once.

Legend: O outputs, I inputs, G groups, n blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pelton.weights.gguf import blocks as layout
from pelton.weights.gguf.formats import FORMATS
from pelton.weights.tensors import WeightTensor

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class GroupedCodes:
    bits: int  # 4 or 8
    codes: U8  # [O, I], from 0 to 2**bits - 1; 2**(bits - 1) is the zero
    scales: F32  # [O, G]
    minima: F32 | None  # [O, G]; None: all are 0

    @property
    def group(self) -> int:
        return int(self.codes.shape[1] // self.scales.shape[1])


# Format -> bits of a code, inputs to a scale.
_GROUPS = {
    "Q4_0": (4, 32),
    "Q4_1": (4, 32),
    "INT4": (4, 32),
    "INT4_CHANNEL": (4, 32),
    "Q4_K": (4, 32),
    "Q5_0": (8, 32),
    "Q5_1": (8, 32),
    "Q5_K": (8, 32),
    "Q6_K": (8, 16),
    "Q8_0": (8, 32),
    "INT8": (8, 32),
}


def bits_of(tensor: WeightTensor) -> tuple[int, int] | None:
    """(bits, inputs to a scale) of a matrix that `grouped_codes` can read; else None."""
    return _GROUPS.get(tensor.format) if len(tensor.shape) == 2 else None


def grouped_codes(tensor: WeightTensor) -> GroupedCodes:
    """Raises `KeyError` for a format without whole numbers."""
    bits, group = _GROUPS[tensor.format]
    num_outputs, num_inputs = tensor.shape
    data = np.ascontiguousarray(tensor.data).reshape(-1, FORMATS[tensor.format].block_bytes)
    with np.errstate(all="ignore"):  # scales of a damaged file
        codes, scales, minima = _read(tensor.format, data)
    shape = (num_outputs, num_inputs // group)
    scales = scales.reshape(shape).astype(np.float32, copy=False)
    if minima is not None:
        minima = minima.reshape(shape).astype(np.float32, copy=False)
        minima = minima - scales * np.float32(_middle(bits))
        minima = minima if minima.any() else None
    return _merged(GroupedCodes(bits, codes.reshape(num_outputs, num_inputs), scales, minima))


def _read(name: str, data: U8) -> tuple[U8, F32, F32 | None]:
    """Codes about their zero, scales, and what is taken off scale * (code in the file); None: of a code about 0."""
    if name in ("Q4_0", "Q4_1", "INT4"):
        block = layout.FIELDS[name](data)
        codes, scales = layout.nibbles(block["qs"], 16), block["d"].astype(np.float32)
        if name == "Q4_0":
            return codes, scales, None
        minimum = block["m"].astype(np.float32)
        return codes, scales, -minimum if name == "Q4_1" else minimum
    if name == "INT4_CHANNEL":
        block = layout.FIELDS[name](data)
        to_zero = np.float32(128) - block["base"].astype(np.float32)
        return layout.nibbles(block["qs"], 16), block["d"] * block["step"].astype(np.float32), block["d"] * to_zero
    if name in ("Q8_0", "INT8"):
        block = layout.FIELDS[name](data)
        return block["qs"].view(np.uint8) ^ np.uint8(128), block["d"].astype(np.float32), None
    if name in ("Q5_0", "Q5_1"):
        block = layout.FIELDS[name](data)
        codes = (layout.nibbles(block["qs"], 16) | layout.fifth_bits(block["qh"])) + np.uint8(112)
        minimum = None if name == "Q5_0" else -block["m"].astype(np.float32)
        return codes, block["d"].astype(np.float32), minimum
    return _read_k(name, data)


def _read_k(name: str, data: U8) -> tuple[U8, F32, F32 | None]:
    block, num_blocks = layout.FIELDS[name](data), len(data)
    d = block["d"].astype(np.float32)[:, None]
    if name == "Q6_K":
        codes = layout.nibbles(block["ql"], 64)
        high = layout.shifted(block["qh"].reshape(num_blocks, 2, 32), [0, 2, 4, 6], 3).reshape(codes.shape)
        return (codes | (high << np.uint8(4))) + np.uint8(96), d * block["scales"], None  # 32 stands for 0
    codes = layout.nibbles(block["qs"], 32)
    if name == "Q5_K":
        high = layout.shifted(block["qh"][:, None, :], list(range(8)), 1).reshape(codes.shape)
        codes = (codes | (high << np.uint8(4))) + np.uint8(112)
    scales, minima = layout.scales_and_mins(block["scales"])
    return codes, d * scales, block["m"].astype(np.float32)[:, None] * minima


def _middle(bits: int) -> int:
    """The code in the file that becomes the zero. Codes of 5 bits become the middle 32 of 8 bits."""
    return 8 if bits == 4 else 16


def _merged(grouped: GroupedCodes) -> GroupedCodes:
    """Groups joined while each pair of neighbours has the same scale and minimum: groups of 128 inputs come in blocks
    of 32."""
    while grouped.scales.shape[1] % 2 == 0 and grouped.group < 128:
        arrays = [grouped.scales] if grouped.minima is None else [grouped.scales, grouped.minima]
        if not all(np.array_equal(array[:, ::2], array[:, 1::2]) for array in arrays):
            break
        halves = [np.ascontiguousarray(array[:, ::2]) for array in arrays]
        grouped = GroupedCodes(grouped.bits, grouped.codes, halves[0], halves[1] if len(halves) > 1 else None)
    return grouped
