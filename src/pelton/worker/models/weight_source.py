"""Where a model's tensors come from."""

from __future__ import annotations

import zlib
from typing import Protocol

import numpy as np

from pelton.core.errors import ModelFileError
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
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        values = generator.standard_normal(shape, dtype=np.float32)
        values *= np.float32(0.02)
        if name.endswith("norm.weight"):
            values += np.float32(1.0)
        return WeightTensor(name, shape, "F32", values.reshape(-1).view(np.uint8))
