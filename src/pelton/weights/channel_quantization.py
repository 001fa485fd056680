"""Weights rounded to 8 bits as they are loaded, one scale per output channel.

The scale is the largest absolute weight of a channel over 127 (round to nearest). Kernels round activations to 8 bits,
too, one scale per token, as LLM.int8() does (Dettmers et al., arXiv:2208.07339); where it keeps outlier columns apart,
a token with an outlier is multiplied twice here, rounded and what rounding left.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pelton.weights.dequantize import dequantize
from pelton.weights.gguf.formats import FORMATS
from pelton.weights.tensors import ModelFiles, WeightTensor

GROUP = 32
# Most of a model's work. Queries, keys and values lose too much with one scale per token (perplexity +0.4%, of 7% of
# the products), and so do embeddings and the output: they keep what they have.
_SUFFIXES = ("o_proj.weight", "gate_proj.weight", "up_proj.weight", "down_proj.weight")
_ROWS_AT_ONCE = 256


class ChannelQuantizedFiles:
    """Implements `ModelFiles`: those of another, with the matrices of its layers as INT8_CHANNEL."""

    def __init__(self, files: ModelFiles) -> None:
        self._files = files
        self.path = files.path
        self.spec = files.spec
        self.generation_defaults = files.generation_defaults
        self.chat_template = files.chat_template
        self.tokenizer_metadata = files.tokenizer_metadata

    def tensor_names(self) -> list[str]:
        return self._files.tensor_names()

    def tensor(self, name: str) -> WeightTensor:
        tensor = self._files.tensor(name)
        is_layer = name.endswith(_SUFFIXES) and len(tensor.shape) == 2 and tensor.shape[1] % GROUP == 0
        return ChannelQuantizedTensor(tensor) if is_layer else tensor

    def drop_pages(self) -> None:
        self._files.drop_pages()


class GroupedFiles(ChannelQuantizedFiles):
    """The same files with INT8 in place of INT8_CHANNEL: the same weights, but finer rounded activations."""

    def tensor(self, name: str) -> WeightTensor:
        return in_groups(self._files.tensor(name))


def in_groups(tensor: WeightTensor) -> WeightTensor:
    return GroupedTensor(tensor) if tensor.format == "INT8_CHANNEL" else tensor


class GroupedTensor(WeightTensor):
    """An INT8_CHANNEL matrix as INT8, whose blocks are the same."""

    __slots__ = ("_source",)

    _source: WeightTensor

    def __init__(self, source: WeightTensor) -> None:
        _set_fields(self, source, "INT8")

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        return self._source.data


class ChannelQuantizedTensor(WeightTensor):
    """A matrix whose INT8_CHANNEL blocks are made each time that `data` is read."""

    __slots__ = ("_source",)

    _source: WeightTensor

    def __init__(self, source: WeightTensor) -> None:
        _set_fields(self, source, "INT8_CHANNEL")

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        num_outputs, num_inputs = self.shape
        blocks = np.empty((num_outputs, num_inputs // GROUP, FORMATS[self.format].block_bytes), np.uint8)
        for start in range(0, num_outputs, _ROWS_AT_ONCE):
            rows = slice(start, min(start + _ROWS_AT_ONCE, num_outputs))
            _quantize(dequantize(self._source, rows=rows), blocks[rows])
        return blocks.reshape(-1)


def _set_fields(tensor: WeightTensor, source: WeightTensor, format_name: str) -> None:
    for name, value in (("name", source.name), ("shape", source.shape), ("format", format_name), ("_source", source)):
        object.__setattr__(tensor, name, value)


def _quantize(values: npt.NDArray[np.float32], blocks: npt.NDArray[np.uint8]) -> None:
    """float32 [O, I] into blocks [O, I / 32, 4 + 32]: a scale and codes. A row of zeros has the scale 0."""
    scales = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scales > 0, np.float32(1) / scales, np.float32(0))
    codes = np.clip(np.rint(values * inverse), -127, 127).astype(np.int8)
    blocks[..., :4] = scales[:, None].view(np.uint8)
    blocks[..., 4:] = codes.view(np.uint8).reshape(*blocks.shape[:2], GROUP)
