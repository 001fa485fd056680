"""`NativeAdapter`: the matrices of a LoRA adapter as native/lora_matrix.h describes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pelton.weights.dequantize import dequantize
from pelton.weights.lora.adapter import LoraModule, LoraWeights
from pelton.weights.tensors import WeightTensor
from pelton.worker.forward_batch import Adapters
from pelton.worker.kernels.cpu import pelton_cpu
from pelton.worker.kernels.cpu.arrays import Ints, address
from pelton.worker.kernels.ops import LoraSite

Matrix = npt.NDArray[Any]


class NativeAdapter:
    """Bfloat16 matrices stay so; others are float32. Nothing is rounded."""

    def __init__(self, weights: LoraWeights, sites: Sequence[LoraSite]) -> None:
        self.native = pelton_cpu.LoraAdapter(len(sites))
        self._matrices: list[Matrix] = []  # what `native` points to
        for index, site in enumerate(sites):
            parts = [(weights.modules.get(name), size) for name, size in site.modules]
            if any(module is not None for module, _ in parts):
                self._add_site(index, site.num_inputs, parts)

    @property
    def num_bytes(self) -> int:
        return sum(matrix.nbytes for matrix in self._matrices)

    def _add_site(self, index: int, num_inputs: int, parts: Sequence[tuple[LoraModule | None, int]]) -> None:
        modules = [module for module, _ in parts if module is not None]
        shrink = self._keep(_padded(_stacked([module.a for module in modules]), 1, pelton_cpu.LORA_ALIGN))
        described, column, first_rank = [], 0, 0
        for module, num_outputs in parts:
            if module is not None:
                expand = self._keep(_panels(_stacked([module.b])))
                place = (first_rank, module.rank, column, num_outputs)
                described.append((*place, module.scale, address(expand), _is_bfloat16(expand)))
                first_rank += module.rank
            column += num_outputs
        self.native.set_site(index, num_inputs, first_rank, (address(shrink), _is_bfloat16(shrink)), described)

    def _keep(self, matrix: Matrix) -> Matrix:
        self._matrices.append(np.ascontiguousarray(matrix))
        return self._matrices[-1]


def native_rows(adapters: Adapters) -> list[tuple[pelton_cpu.LoraAdapter, Ints]]:
    return [(adapter.native, rows) for adapter, rows in adapters]


def _stacked(tensors: Sequence[WeightTensor]) -> Matrix:
    """One below another; the bits of bfloat16 where all are of it."""
    if all(tensor.format == "BF16" for tensor in tensors):
        return np.concatenate([tensor.data.view(np.uint16).reshape(tensor.shape) for tensor in tensors])
    return np.concatenate([dequantize(tensor) for tensor in tensors])


def _padded(matrix: Matrix, axis: int, multiple: int) -> Matrix:
    missing = -matrix.shape[axis] % multiple
    return np.pad(matrix, [(0, missing if axis == i else 0) for i in range(matrix.ndim)])


def _panels(matrix: Matrix) -> Matrix:
    """[O, r] -> [panels, r, panel], zeros past the last output."""
    padded = _padded(matrix, 0, pelton_cpu.LORA_PANEL)
    return padded.reshape(-1, pelton_cpu.LORA_PANEL, matrix.shape[1]).swapaxes(1, 2)


def _is_bfloat16(matrix: Matrix) -> bool:
    return bool(matrix.dtype == np.uint16)
