"""Weights rounded as they are loaded, with one scale per output channel.

w8a8: the scale is the largest absolute weight of a channel over 127 (round to nearest). Kernels round activations to 8
bits, too, one scale per token, as LLM.int8() does (Dettmers et al., arXiv:2208.07339); where it multiplies columns with
outliers apart in 16 bits, a token's outliers have codes of up to 16 bits here, on the same scale as the others.

w4a8: the codes of w8a8 in groups of 32, each on a line of 16 points, base + step * q, all of them integers as in QServe
(Lin et al., arXiv:2405.04532): products are those of 8 bits, of half the bytes.

Legend: O outputs, I inputs, G groups of 32 inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt

from pelton.weights.dequantize import dequantize, num_cores
from pelton.weights.gguf.formats import FORMATS
from pelton.weights.tensors import ModelFiles, WeightTensor

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

GROUP = 32
# Most of a layer's work. Queries, keys and values lose too much with one scale per token (perplexity +0.4%, of 7% of
# the products) and keep what they have.
_SUFFIXES = ("o_proj.weight", "gate_proj.weight", "up_proj.weight", "down_proj.weight")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Few enough to stay in the caches between the passes over them, enough for threads not to wait for the interpreter.
_VALUES_AT_ONCE = 1 << 19
_GROUPS_AT_ONCE = 1 << 12
_ZERO = 128  # the code of a weight of 0
CHANNEL_QUANTIZATIONS = ("w8a8", "w4a8")


class ChangedFiles:
    """Implements `ModelFiles`: those of another, with each tensor as `change` makes it."""

    def __init__(self, files: ModelFiles, change: Callable[[WeightTensor], WeightTensor]) -> None:
        self._files = files
        self._change = change
        self.path = files.path
        self.spec = files.spec
        self.generation_defaults = files.generation_defaults
        self.chat_template = files.chat_template
        self.tokenizer_metadata = files.tokenizer_metadata

    def tensor_names(self) -> list[str]:
        return self._files.tensor_names()

    def tensor(self, name: str) -> WeightTensor:
        return self._change(self._files.tensor(name))

    def drop_pages(self) -> None:
        self._files.drop_pages()


class QuantizedFiles(ChangedFiles):
    """Those of another with the matrices of layers and the output rounded as `quantization` says. An output that is the
    embedding becomes a matrix of its own, and the embedding stays as it is."""

    def __init__(self, files: ModelFiles, quantization: str) -> None:
        super().__init__(files, partial(_round_layer, quantization=quantization))
        self._quantization = quantization
        self._is_tied = files.spec.tie_word_embeddings
        self.spec = dataclasses.replace(files.spec, tie_word_embeddings=False)

    def tensor_names(self) -> list[str]:
        return [*super().tensor_names(), *([_HEAD] if self._is_tied else ())]

    def tensor(self, name: str) -> WeightTensor:
        if name == _HEAD and self._is_tied:
            return round_channels(self._files.tensor(_EMBEDDING), self._quantization, name)
        return super().tensor(name)


class _MadeTensor(WeightTensor):
    """A matrix in another format, whose blocks [O, G, block bytes] are made each time that `data` is read."""

    __slots__ = ("_make", "source")

    source: WeightTensor
    _make: Callable[[WeightTensor], U8]

    def __init__(
        self, source: WeightTensor, format_name: str, make: Callable[[WeightTensor], U8], name: str = ""
    ) -> None:
        fields = {
            "name": name or source.name,
            "shape": source.shape,
            "format": format_name,
            "source": source,
            "_make": make,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def data(self) -> U8:
        source = self.source  # whose data may be made, too: once, however many parts of it are asked for
        return self._make(WeightTensor(source.name, source.shape, source.format, source.data)).reshape(-1)


class RoundedTensor(_MadeTensor):
    """`source` rounded by channel. Kernels may do that themselves, to the same bits, and leave `data` unread."""

    __slots__ = ()


def _round_layer(tensor: WeightTensor, quantization: str) -> WeightTensor:
    return round_channels(tensor, quantization) if tensor.name.endswith((*_SUFFIXES, _HEAD)) else tensor


def round_channels(tensor: WeightTensor, quantization: str, name: str = "") -> WeightTensor:
    """The matrix [O, I] as INT8_CHANNEL (w8a8) or INT4_CHANNEL (w4a8), or itself where I is no multiple of 32."""
    if tensor.shape[-1] % GROUP:
        return tensor
    if quantization == "w4a8":
        return RoundedTensor(tensor, "INT4_CHANNEL", _round_to_int4, name)
    return RoundedTensor(tensor, "INT8_CHANNEL", _round_to_int8, name)


def in_groups(tensor: WeightTensor) -> WeightTensor:
    """The same weights for finer rounded activations: INT8_CHANNEL as INT8, INT4_CHANNEL as INT4."""
    if tensor.format == "INT8_CHANNEL":
        return _MadeTensor(tensor, "INT8", lambda source: source.data)
    return _MadeTensor(tensor, "INT4", _regroup_int4) if tensor.format == "INT4_CHANNEL" else tensor


def _round_to_int8(source: WeightTensor) -> U8:
    """A scale and codes. A row of zeros has the scale 0; one that is not finite NaN."""
    blocks = _empty_blocks(source, "INT8_CHANNEL")

    def fill(rows: slice) -> None:
        scales, codes = _scaled_rows(source, rows)
        blocks[rows, :, :4] = scales[:, None].view(np.uint8)
        rounded = np.clip(np.rint(codes), -127, 127).astype(np.int8).view(np.uint8)
        blocks[rows, :, 4:] = rounded.reshape(len(rounded), -1, GROUP)

    _for_some_rows(source.shape, fill)
    return blocks


def _round_to_int4(source: WeightTensor) -> U8:
    """A scale, step and base, and codes in pairs."""
    blocks = _empty_blocks(source, "INT4_CHANNEL")

    def fill(rows: slice) -> None:
        scales, codes = _scaled_rows(source, rows)
        step, base, q = _fit_lines(codes.reshape(-1, GROUP) + np.float32(_ZERO))
        own = blocks[rows]
        own[..., :4] = scales[:, None].view(np.uint8)
        own[..., 4] = step.reshape(own.shape[:2])
        own[..., 5] = base.reshape(own.shape[:2])
        own[..., 6:] = (q[:, :16] | q[:, 16:] << np.uint8(4)).reshape(*own.shape[:2], 16)

    _for_some_rows(source.shape, fill)
    return blocks


def _regroup_int4(source: WeightTensor) -> U8:
    """scale * (base + step * q - 128) as factor * q - minimum."""
    blocks = _empty_blocks(source, "INT4")
    own = source.data.reshape(*blocks.shape[:2], -1)
    scales = np.ascontiguousarray(own[..., :4]).view(np.float32)
    step, base = own[..., 4:5].astype(np.float32), own[..., 5:6].astype(np.float32)
    blocks[..., :4] = (scales * step).view(np.uint8)
    blocks[..., 4:8] = (scales * (np.float32(_ZERO) - base)).view(np.uint8)
    blocks[..., 8:] = own[..., 6:]
    return blocks


def _empty_blocks(source: WeightTensor, format_name: str) -> U8:
    num_outputs, num_inputs = source.shape
    return np.empty((num_outputs, num_inputs // GROUP, FORMATS[format_name].block_bytes), np.uint8)


def _for_some_rows(shape: tuple[int, ...], fill: Callable[[slice], None]) -> None:
    """Parts of all rows, on as many threads as there are cores: numpy works without the interpreter's lock."""
    num_rows, num_inputs = shape
    at_once = max(1, _VALUES_AT_ONCE // num_inputs)
    parts = [slice(start, min(start + at_once, num_rows)) for start in range(0, num_rows, at_once)]
    with ThreadPoolExecutor(num_cores()) as pool:
        list(pool.map(fill, parts))


def _scaled_rows(source: WeightTensor, rows: slice) -> tuple[F32, F32]:
    """Scales [n, 1] of some rows and their values over scales [n, I], from -127 to 127, or 0 where a scale is too
    small to divide by or not a number."""
    values = dequantize(source, rows=rows, num_threads=1)
    scales = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    scales[~np.isfinite(scales)] = np.nan
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    has_inverse = np.isfinite(inverse)
    if not has_inverse.all():
        values, inverse = np.where(has_inverse, values, 0), np.where(has_inverse, inverse, 0)
    return scales, values * inverse


def _fit_lines(codes: F32) -> tuple[U8, U8, U8]:
    """Step [n], base [n] and q [n, 32] of the nearest of some lines for each group of codes [n, 32] from 1 to 255.

    The widest reaches both ends of the group; a narrower one, which cuts them off, may be nearer to the rest.
    """
    num_groups = len(codes)
    steps, bases = (np.empty(num_groups, np.uint8) for _ in range(2))
    qs = np.empty(codes.shape, np.uint8)
    for start in range(0, num_groups, _GROUPS_AT_ONCE):
        part = slice(start, start + _GROUPS_AT_ONCE)
        steps[part], bases[part], qs[part] = _fit_lines_in_cache(np.ascontiguousarray(codes[part].T))
    return steps, bases, qs


def _fit_lines_in_cache(codes: F32) -> tuple[F32, F32, F32]:
    """As `_fit_lines` for codes [32, n], so that vectors run along groups. q is [n, 32]."""
    low, high = codes.min(axis=0), codes.max(axis=0)
    widest = np.ceil((high - low) / np.float32(15))
    least = np.full(len(low), np.inf, np.float32)
    steps, bases = np.empty_like(low), np.empty_like(low)
    work = np.empty_like(codes)
    for narrower in range(3):
        step = np.maximum(widest - np.float32(narrower), np.float32(1))
        base = np.clip(np.rint((low + high - 15 * step) / 2), 0, 255 - 15 * step)
        _nearest_points(codes, step, base, work)
        np.multiply(work, step, out=work)
        np.add(work, base, out=work)
        np.subtract(work, codes, out=work)
        np.multiply(work, work, out=work)
        error = _sum_of_group(work)
        is_nearer = error < least
        least = np.where(is_nearer, error, least)
        np.copyto(steps, step, where=is_nearer)
        np.copyto(bases, base, where=is_nearer)
    _nearest_points(codes, steps, bases, work)
    return steps, bases, work.T


def _nearest_points(codes: F32, step: F32, base: F32, out: F32) -> None:
    """q [32, n] of lines with `step` and `base` [n]."""
    np.subtract(codes, base, out=out)
    np.divide(out, step, out=out)
    np.rint(out, out=out)
    np.maximum(out, np.float32(0), out=out)
    np.minimum(out, np.float32(15), out=out)


def _sum_of_group(values: F32) -> F32:
    """Over the first axis [32, n], in the order in which numpy adds up 32 neighbours: what is kept on disk depends on
    the last bit."""
    eight = values[:8] + values[8:16]
    eight += values[16:24]
    eight += values[24:]
    pairs = eight[0::2] + eight[1::2]
    total: F32 = (pairs[0] + pairs[1]) + (pairs[2] + pairs[3])
    return total
