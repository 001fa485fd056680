"""Packed matrices and where they lie: each in memory of its own, or all in one piece that a file can hold."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pelton.weights.channel_quantization import RoundedTensor
from pelton.weights.dequantize import dequantize
from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.cpu import pelton_cpu

_FORMATS = frozenset(pelton_cpu.FORMATS)
_BLOCK_FORMATS = frozenset(pelton_cpu.BLOCK_FORMATS)  # of those that are rounded
_DENSE_FORMATS = frozenset({"F32", "F16", "BF16"})  # of any width
_GROUP = 32  # inputs
ALIGNMENT = 64


class PlacedMatrix(NamedTuple):
    """A packed matrix in a `WeightMemory`."""

    format: str
    num_outputs: int
    num_inputs: int
    offset: int

    @classmethod
    def of(cls, tensor: WeightTensor, offset: int = 0) -> PlacedMatrix:
        num_outputs, num_inputs = tensor.shape
        return cls(packed_format(tensor), num_outputs, num_inputs, offset)

    @property
    def num_bytes(self) -> int:
        return pelton_cpu.packed_num_bytes(self.format, self.num_outputs, self.num_inputs)


def packed_format(tensor: WeightTensor) -> str:
    """The format that a matrix is kept in: its own, or float32 where that has no native kernel."""
    has_kernel = tensor.format in _FORMATS and (tensor.format in _DENSE_FORMATS or tensor.shape[-1] % _GROUP == 0)
    return tensor.format if has_kernel else "F32"


def is_kept_dense(tensor: WeightTensor) -> bool:
    """Whether its values are floats: there is nothing to unpack."""
    return packed_format(tensor) in _DENSE_FORMATS


class PackedWeights:
    """Gives each matrix memory of its own."""

    num_mapped_bytes = 0  # that memory of the process's own will take the place of

    def __init__(self, runtime: pelton_cpu.Runtime) -> None:
        self._runtime = runtime

    def add_to(self, weight: pelton_cpu.LinearWeight, tensor: WeightTensor) -> None:
        """Adds the matrix [O, I], repacked, to those of `weight`."""
        self._repack(weight, tensor, None, 0)

    def _repack(
        self,
        weight: pelton_cpu.LinearWeight,
        tensor: WeightTensor,
        memory: pelton_cpu.WeightMemory | None,
        offset: int,
    ) -> None:
        kept = packed_format(tensor)
        if isinstance(tensor, RoundedTensor) and tensor.source.format in _BLOCK_FORMATS:
            source = np.ascontiguousarray(tensor.source.data)
            place = (tensor.shape[0], source.ctypes.data, source.nbytes, memory, offset)
            weight.add_rounded(self._runtime, (tensor.source.format, kept), *place)
            return
        data = np.ascontiguousarray(tensor.data) if kept == tensor.format else dequantize(tensor)
        weight.add(self._runtime, kept, tensor.shape[0], data.ctypes.data, data.nbytes, memory, offset)


class MappedWeights(PackedWeights):
    """Finds matrices in memory that holds them already."""

    def __init__(
        self, runtime: pelton_cpu.Runtime, memory: pelton_cpu.WeightMemory, matrices: dict[str, PlacedMatrix]
    ) -> None:
        super().__init__(runtime)
        self._memory = memory
        self._matrices = matrices
        self.is_complete = True

    @property
    def num_mapped_bytes(self) -> int:  # type: ignore[override]
        return self._memory.num_mapped_bytes

    def add_to(self, weight: pelton_cpu.LinearWeight, tensor: WeightTensor) -> None:
        found = self._matrices.get(tensor.name)
        if found is None or found[:3] != (packed_format(tensor), *tensor.shape):
            self.is_complete = False
            super().add_to(weight, tensor)
        else:
            weight.add_packed(found.format, found.num_outputs, self._memory, found.offset)


class CollectedWeights(PackedWeights):
    """Puts matrices one behind another into `memory`, from `first_offset` on, and remembers where."""

    def __init__(self, runtime: pelton_cpu.Runtime, memory: pelton_cpu.WeightMemory, first_offset: int) -> None:
        super().__init__(runtime)
        self.memory = memory
        self.matrices: dict[str, PlacedMatrix] = {}
        self.end = first_offset

    def add_to(self, weight: pelton_cpu.LinearWeight, tensor: WeightTensor) -> None:
        placed = PlacedMatrix.of(tensor, self.end)
        end = self.end + -(-placed.num_bytes // ALIGNMENT) * ALIGNMENT
        if tensor.name in self.matrices or end > self.memory.num_bytes:
            super().add_to(weight, tensor)
            return
        self._repack(weight, tensor, self.memory, self.end)
        self.matrices[tensor.name] = placed
        self.end = end
