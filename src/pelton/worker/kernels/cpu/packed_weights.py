"""Packed matrices and where they lie: each in memory of its own, or all in one piece that a file can hold."""

from __future__ import annotations

from typing import NamedTuple

from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.cpu import pelton_cpu

_FORMATS = frozenset(pelton_cpu.FORMATS)
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
        return cls(tensor.format, num_outputs, num_inputs, offset)

    @property
    def num_bytes(self) -> int:
        return pelton_cpu.packed_num_bytes(self.format, self.num_outputs, self.num_inputs)


def is_packable(tensor: WeightTensor) -> bool:
    """Whether there is a native kernel for a matrix of this format and width."""
    return tensor.format in _FORMATS and tensor.shape[-1] % _GROUP == 0


class PackedWeights:
    """Gives each matrix memory of its own."""

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
        data = tensor.data
        weight.add(self._runtime, tensor.format, tensor.shape[0], data.ctypes.data, data.nbytes, memory, offset)


class MappedWeights(PackedWeights):
    """Finds matrices in memory that holds them already."""

    def __init__(
        self, runtime: pelton_cpu.Runtime, memory: pelton_cpu.WeightMemory, matrices: dict[str, PlacedMatrix]
    ) -> None:
        super().__init__(runtime)
        self._memory = memory
        self._matrices = matrices
        self.is_complete = True

    def add_to(self, weight: pelton_cpu.LinearWeight, tensor: WeightTensor) -> None:
        found = self._matrices.get(tensor.name)
        if found is None or found[:3] != (tensor.format, *tensor.shape):
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
