"""Matrices in float8 e4m3 as blocks of 32 inputs, without loss: a scale per output, or per 128 x 128 weights.

The latter are the checkpoints of DeepSeek-V3 (arXiv:2412.19437, section 3.3) and Qwen3 ("fp8"), the former those of
compressed-tensors ("float-quantized").

Legend: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pelton.core.errors import ModelFileError, UnsupportedModelError
from pelton.weights.compressed.scheme import GROUP, SCALE_BLOCK, CompressedScheme
from pelton.weights.dequantize import dequantize
from pelton.weights.gguf.formats import FORMATS
from pelton.weights.tensors import WeightTensor


class Fp8Tensor(WeightTensor):
    """A `WeightTensor` whose bytes are made each time that `data` is read. Raises as `CompressedTensor`."""

    __slots__ = ("_codes", "_scales")

    _codes: WeightTensor
    _scales: npt.NDArray[np.float32]

    def __init__(
        self, path: Path, name: str, shape: tuple[int, ...], scheme: CompressedScheme, parts: Mapping[str, WeightTensor]
    ) -> None:
        for part in scheme.parts:
            if part not in parts:
                raise ModelFileError(path, f"tensor {name.removesuffix('weight')}{part} is missing")
        if shape[1] % GROUP:
            raise UnsupportedModelError(f"{path}: {name} has {shape[1]} inputs, which are no multiple of {GROUP}")
        codes = parts["weight"]
        if codes.format != "F8_E4M3" or codes.shape != shape:
            raise ModelFileError(
                path,
                f"tensor {name} is {codes.format} {list(codes.shape)}; {scheme.name} asks for F8_E4M3 {list(shape)}",
            )
        fields = {"name": name, "shape": shape, "format": "FP8", "_codes": codes}
        fields["_scales"] = _read_scales(path, scheme, parts[scheme.scale_part], shape)
        for field, value in fields.items():
            object.__setattr__(self, field, value)

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        num_outputs, num_inputs = self.shape
        blocks = np.empty((num_outputs, num_inputs // GROUP, FORMATS[self.format].block_bytes), np.uint8)
        blocks[..., :4] = np.ascontiguousarray(self._scales)[..., None].view(np.uint8)
        blocks[..., 4:] = self._codes.data.reshape(num_outputs, -1, GROUP)
        return blocks.reshape(-1)


def _read_scales(
    path: Path, scheme: CompressedScheme, part: WeightTensor, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """float32 [O, I / 32]."""
    num_outputs, num_inputs = shape
    wanted = [(num_outputs, 1), (num_outputs,), (1,), ()]
    if scheme.group_size is not None:
        wanted = [(-(-num_outputs // SCALE_BLOCK), -(-num_inputs // SCALE_BLOCK))]
    if part.format not in ("F32", "F16", "BF16") or part.shape not in wanted:
        raise ModelFileError(
            path,
            f"tensor {part.name} is {part.format} {list(part.shape)}; {scheme.name} asks for floats {list(wanted[0])}",
        )
    flat = dequantize(WeightTensor(part.name, (max(int(np.prod(part.shape)), 1),), part.format, part.data))
    if scheme.group_size is None:
        return np.broadcast_to(flat.reshape(-1, 1), (num_outputs, num_inputs // GROUP))
    by_rows = flat.reshape(wanted[0]).repeat(SCALE_BLOCK, axis=0)[:num_outputs]
    return by_rows.repeat(SCALE_BLOCK // GROUP, axis=1)[:, : num_inputs // GROUP]
