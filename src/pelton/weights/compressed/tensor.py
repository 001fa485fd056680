"""Compressed matrices as blocks of 32 inputs, without loss.

Q4_0 and Q8_0 are what symmetric weights become where float16 holds all their scales; INT4 and INT8 have
float32 scales, and INT4 a minimum; INT8_CHANNEL is INT8 whose activations are rounded per token. Only the scales
and zero points are read to know which; the codes are when the data is asked for.

Legend: O outputs, I inputs, G groups of scales (I / group_size), n blocks of an output (I / 32).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pelton.core.errors import ModelFileError, UnsupportedModelError
from pelton.weights.compressed.scheme import GROUP, CompressedScheme
from pelton.weights.gguf.formats import FORMATS
from pelton.weights.tensors import WeightTensor

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

# Where the eight outputs of one of AWQ's words lie in it, four bits each, lowest first.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_FLOATS = ("F16", "BF16", "F32")


class CompressedTensor(WeightTensor):
    """A `WeightTensor` whose bytes are made, from the mapped file's, each time that `data` is read.

    `parts` are the stored tensors by the ending of their name. Raises `ModelFileError` where one has another
    type or shape than the scheme asks for, `UnsupportedModelError` where inputs are out of order.
    """

    __slots__ = ("_parts", "_path", "_scales", "_scheme", "_zeros")

    _path: Path
    _scheme: CompressedScheme
    _parts: dict[str, WeightTensor]
    _scales: F32
    _zeros: F32

    def __init__(
        self, path: Path, name: str, shape: tuple[int, ...], scheme: CompressedScheme, parts: Mapping[str, WeightTensor]
    ) -> None:
        set_field = object.__setattr__
        set_field(self, "name", name)
        set_field(self, "shape", shape)
        set_field(self, "_path", path)
        set_field(self, "_scheme", scheme)
        set_field(self, "_parts", dict(parts))
        self._check_parts()
        set_field(self, "_scales", self._read_scales())
        set_field(self, "_zeros", self._read_zeros())
        set_field(self, "format", self._choose_format())

    @property
    def data(self) -> U8:
        blocks = np.empty((*self._block_shape, FORMATS[self.format].block_bytes), np.uint8)
        codes = self._read_codes().reshape(*self._block_shape, GROUP)
        repeats = self._block_shape[1] // self._scales.shape[1]
        scales = np.repeat(self._scales, repeats, axis=1)[..., None]
        if self.format == "Q8_0":
            blocks[..., :2], blocks[..., 2:] = scales.astype("<f2").view(np.uint8), codes
        elif self.format in ("INT8", "INT8_CHANNEL"):
            blocks[..., :4], blocks[..., 4:] = scales.view(np.uint8), codes
        else:
            blocks[..., -16:] = codes[..., :16] | (codes[..., 16:] << np.uint8(4))
            if self.format == "Q4_0":
                blocks[..., :2] = scales.astype("<f2").view(np.uint8)
            else:
                minima = scales * np.repeat(self._zeros, repeats, axis=1)[..., None]
                blocks[..., :4], blocks[..., 4:8] = scales.view(np.uint8), minima.view(np.uint8)
        return blocks.reshape(-1)

    @property
    def _block_shape(self) -> tuple[int, int]:
        num_outputs, num_inputs = self.shape
        return num_outputs, num_inputs // GROUP

    @property
    def _num_groups(self) -> int:
        size = self._scheme.group_size
        return 1 if size is None else self.shape[1] // size

    def _check_parts(self) -> None:
        num_outputs, num_inputs = self.shape
        if num_inputs % (self._scheme.group_size or GROUP) or num_inputs % GROUP:
            raise UnsupportedModelError(
                f"{self._path}: {self.name} has {num_inputs} inputs, which are no whole groups of "
                f"{self._scheme.group_size or GROUP}"
            )
        for part, is_needed in self._scheme.parts.items():
            if is_needed and part not in self._parts:
                raise ModelFileError(self._path, f"tensor {self.name.removesuffix('weight')}{part} is missing")
        index = self._parts.get("g_idx") or self._parts.get("weight_g_idx")
        if index is not None:
            order = self._array(index, "I32", (num_inputs,))
            if not np.array_equal(order, np.arange(num_inputs) // (self._scheme.group_size or num_inputs)):
                raise UnsupportedModelError(
                    f"{self._path}: the inputs of {self.name} are ordered by activation (desc_act, actorder group); "
                    "supported is an order in which those of a group lie together"
                )
        if num_outputs % 8 and self._scheme.layout in ("gptq", "awq"):
            raise UnsupportedModelError(f"{self._path}: {self.name} has {num_outputs} outputs, no multiple of 8")

    def _array(self, part: WeightTensor, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.integer]:
        if part.format != dtype or part.shape != shape:
            raise ModelFileError(
                self._path,
                f"tensor {part.name} is {part.format} {list(part.shape)}; {self._scheme.name} asks for {dtype} "
                f"{list(shape)}",
            )
        return part.data.view({"I32": "<i4", "I8": "i1"}[dtype]).reshape(shape)

    def _read_scales(self) -> F32:
        """float32 [O, G]."""
        num_outputs, num_groups = self.shape[0], self._num_groups
        is_transposed = self._scheme.layout in ("gptq", "awq")
        part = self._parts["scales" if is_transposed else "weight_scale"]
        num_values = int(np.prod(part.shape, dtype=np.int64))
        shapes = [(num_groups, num_outputs)] if is_transposed else [(num_outputs, num_groups), (num_outputs,), (1,), ()]
        if part.format not in _FLOATS or part.shape not in shapes or num_values not in (1, num_outputs * num_groups):
            raise ModelFileError(
                self._path,
                f"tensor {part.name} is {part.format} {list(part.shape)}; {self._scheme.name} asks for floats "
                f"{list(shapes[0])}",
            )
        if part.format == "BF16":
            values = (part.data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            values = part.data.view("<f2" if part.format == "F16" else "<f4").astype(np.float32)
        if is_transposed:
            return np.ascontiguousarray(values.reshape(num_groups, num_outputs).T)
        return np.broadcast_to(values.reshape(-1, num_groups if num_values > 1 else 1), (num_outputs, num_groups))

    def _read_zeros(self) -> F32:
        """What a code of 0 stands for: float32 [O, G]."""
        scheme, (num_outputs, _), num_groups = self._scheme, self.shape, self._num_groups
        if scheme.layout in ("gptq", "awq"):
            words = self._array(self._parts["qzeros"], "I32", (num_groups, num_outputs // 8))
            order = _AWQ_ORDER if scheme.layout == "awq" else None
            zeros = _nibbles(words, order).reshape(num_groups, num_outputs).T
            return np.ascontiguousarray(zeros + np.float32(scheme.zero_offset), dtype=np.float32)
        if "weight_zero_point" in self._parts and scheme.layout == "plain":
            zeros = self._parts["weight_zero_point"].data
            if zeros.any():
                raise UnsupportedModelError(f"{self._path}: {self.name} has zero points with its 8 bits")
        if not scheme.is_symmetric:
            words = self._array(self._parts["weight_zero_point"], "I32", (-(-num_outputs // 8), num_groups))
            zeros = _nibbles(words.T, None).reshape(num_groups, -1)[:, :num_outputs].T
            return np.ascontiguousarray(zeros, dtype=np.float32)
        return np.full((num_outputs, num_groups), 8.0 if scheme.bits == 4 else 0.0, np.float32)

    def _choose_format(self) -> str:
        with np.errstate(over="ignore"):
            fits = bool((self._scales.astype(np.float16).astype(np.float32) == self._scales).all())
        if self._scheme.rounds_tokens:
            return "INT8_CHANNEL"
        if self._scheme.bits == 8:
            return "Q8_0" if fits else "INT8"
        return "Q4_0" if fits and bool((self._zeros == 8.0).all()) else "INT4"

    def _read_codes(self) -> U8:
        """[O, I]: 4 bits unsigned, 8 bits signed (as bytes)."""
        num_outputs, num_inputs = self.shape
        layout = self._scheme.layout
        if layout == "plain":
            return self._array(self._parts["weight"], "I8", (num_outputs, num_inputs)).view(np.uint8)
        if layout == "awq":
            words = self._array(self._parts["qweight"], "I32", (num_inputs, num_outputs // 8))
            return np.ascontiguousarray(_nibbles(words, _AWQ_ORDER).reshape(num_inputs, num_outputs).T)
        if layout == "gptq":
            words = self._array(self._parts["qweight"], "I32", (num_inputs // 8, num_outputs))
            return _nibbles(np.ascontiguousarray(words.T), None).reshape(num_outputs, num_inputs)
        words = self._array(self._parts["weight_packed"], "I32", (num_outputs, num_inputs * self._scheme.bits // 32))
        if self._scheme.bits == 4:
            return _nibbles(words, None).reshape(num_outputs, num_inputs)
        return np.ascontiguousarray(words).view(np.uint8) ^ np.uint8(128)  # stored plus 128


def _nibbles(words: npt.NDArray[np.integer], order: tuple[int, ...] | None) -> U8:
    """int32 [..., m] -> the eight codes of each word [..., m, 8]: lowest bits first, or in `order`."""
    pairs = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    codes = np.empty((*words.shape, 4, 2), np.uint8)
    np.bitwise_and(pairs, np.uint8(15), out=codes[..., 0])
    np.right_shift(pairs, np.uint8(4), out=codes[..., 1])
    eight = codes.reshape(*words.shape, 8)
    return eight if order is None else eight[..., list(order)]
