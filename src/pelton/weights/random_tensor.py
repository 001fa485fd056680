"""Tensors without a file: random values, the same ones every time for one name."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from pelton.weights.tensors import WeightTensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class RandomTensor(WeightTensor):
    """Normal values around `mean`. The bytes, float32, are made when `data` is first read; who fills memory of another
    device may draw others there, by `seed`."""

    __slots__ = ("_bytes", "mean", "seed", "std")

    _bytes: npt.NDArray[np.uint8] | None

    mean: float
    seed: int
    std: float

    def __init__(self, name: str, shape: tuple[int, ...], mean: float, std: float) -> None:
        set_field = object.__setattr__
        set_field(self, "name", name)
        set_field(self, "shape", shape)
        set_field(self, "format", "F32")
        set_field(self, "mean", mean)
        set_field(self, "std", std)
        set_field(self, "_bytes", None)
        set_field(self, "seed", zlib.crc32(name.encode()))

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        if self._bytes is None:
            object.__setattr__(self, "_bytes", self._make())
        assert self._bytes is not None
        return self._bytes

    def _make(self) -> npt.NDArray[np.uint8]:
        import numpy as np

        values = np.random.default_rng(self.seed).standard_normal(self.shape, dtype=np.float32)
        values *= np.float32(self.std)
        if self.mean:
            values += np.float32(self.mean)
        return values.reshape(-1).view(np.uint8)
