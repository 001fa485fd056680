"""Where a model's tensors come from, with their shapes checked."""

from __future__ import annotations

import zlib
from typing import Protocol

import numpy as np

from pelton.core.errors import ModelFileError, UnsupportedModelError
from pelton.weights.tensors import ModelFiles, WeightTensor

# Tensors that files carry without need.
_NEEDLESS_SUFFIXES = ("rotary_emb.inv_freq",)


class WeightSource(Protocol):
    def tensor(self, name: str, shape: tuple[int, ...]) -> WeightTensor: ...

    def check_all_used(self) -> None:
        """Raises where something that would change the model's answers was never asked for."""
        ...


class FileWeights:
    """Tensors of a file. Raises `ModelFileError` for a tensor that is missing or has another shape."""

    def __init__(self, files: ModelFiles) -> None:
        self._files = files
        self._unused = set(files.tensor_names())

    def tensor(self, name: str, shape: tuple[int, ...]) -> WeightTensor:
        tensor = self._files.tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelFileError(self._files.path, f"tensor {name} has shape {list(tensor.shape)}, not {list(shape)}")
        self._unused.discard(name)
        return tensor

    def check_all_used(self) -> None:
        unused = sorted(
            name for name in self._unused if name.startswith("model.layers.") and not name.endswith(_NEEDLESS_SUFFIXES)
        )
        if unused:
            raise UnsupportedModelError(
                f"{self._files.path}: {len(unused)} tensors are not part of the architecture "
                f"{self._files.spec.architecture}, for example {', '.join(unused[:3])}"
            )


class RandomWeights:
    """Tensors of any name and shape, the same ones every time; small enough for a model to stay finite."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> WeightTensor:
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        values = generator.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        return WeightTensor(name, shape, "F32", values.reshape(-1).view(np.uint8))

    def check_all_used(self) -> None:
        pass
