"""Where a model's tensors come from."""

from __future__ import annotations

from typing import Protocol

from pelton.core.errors import ModelFileError
from pelton.weights.random_tensor import RandomTensor
from pelton.weights.tensors import ModelFiles, WeightTensor


class WeightSource(Protocol):
    def tensor(self, name: str, shape: tuple[int, ...]) -> WeightTensor: ...


class FileWeights:
    """Tensors of a file. Raises `ModelFileError` for a tensor that is missing or has another shape."""

    def __init__(self, files: ModelFiles) -> None:
        self._files = files

    def tensor(self, name: str, shape: tuple[int, ...]) -> WeightTensor:
        tensor = self._files.tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelFileError(self._files.path, f"tensor {name} has shape {list(tensor.shape)}, not {list(shape)}")
        return tensor


class RandomWeights:
    """Tensors of any name and shape, the same ones every time; norms stay near 1."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> WeightTensor:
        return RandomTensor(name, shape, 1.0 if name.endswith("norm.weight") else 0.0, 0.02)
