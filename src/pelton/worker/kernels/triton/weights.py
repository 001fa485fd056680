"""Weights as the products want them, on the device, and how they are made from a file's tensors.

Legend: O outputs, I inputs, G groups, B blocks of 16 words (`packed_kernels.py`), E experts. A weight of experts has E
in front of every shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pelton.core.errors import UnsupportedModelError
from pelton.weights.gguf.codes import GroupedCodes, bits_of, grouped_codes
from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.triton.dense import fill_dense

WORDS = 16
SCALE_BLOCK = 128  # weights each way that share a scale (fp8_block)
QUANTIZATIONS = ("int8", "fp8", "fp8_block")


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """In floats, or in 8 bits for rows that are rounded to 8 bits, too."""

    kind: str  # float, int8, fp8, fp8_block
    matrix: torch.Tensor  # [O, I]
    scales: torch.Tensor | None = None  # float32 [O], or [ceil(O / 128), ceil(I / 128)] for fp8_block

    @property
    def num_outputs(self) -> int:
        return self.matrix.shape[-2]

    @property
    def num_inputs(self) -> int:
        return self.matrix.shape[-1]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    bits: int
    group: int  # inputs
    words: torch.Tensor  # int32 [B, O, 16]
    scales: torch.Tensor  # [G, O]
    minima: torch.Tensor | None  # [G, O]
    num_inputs: int
    kind: str = "packed"

    @property
    def num_outputs(self) -> int:
        return self.words.shape[-2]

    @property
    def part(self) -> int:
        """Inputs of a block that share a scale."""
        return math.gcd(self.group, self.block)

    @property
    def block(self) -> int:
        return WORDS * 32 // self.bits


Weight = DenseWeight | PackedWeight


@dataclass(frozen=True, slots=True)
class Weights:
    """Matrices one below another; those of one layout are one."""

    parts: tuple[Weight, ...]

    @property
    def num_outputs(self) -> int:
        return sum(part.num_outputs for part in self.parts)


def num_weight_bytes(tensor: WeightTensor, dtype: torch.dtype) -> int:
    """What `tensor` takes on the device, at most."""
    num_values = math.prod(tensor.shape)
    found = bits_of(tensor)
    if found is None:
        if tensor.format in ("INT8_CHANNEL", "FP8"):
            return num_values + 4 * tensor.shape[0] * (-(-tensor.shape[1] // 128))
        return num_values * dtype.itemsize
    bits, group = found
    num_outputs, num_inputs = tensor.shape
    block = WORDS * 32 // bits
    return num_outputs * (-(-num_inputs // block) * WORDS * 4 + num_inputs // group * 8)


def layout_of(tensor: WeightTensor) -> Any:
    """Neighbours of equal layout become one matrix."""
    if tensor.format == "FP8":
        # Blocks of scales start with their matrix.
        return "fp8" if tensor.shape[0] % SCALE_BLOCK == 0 else ("fp8", tensor.name)
    return bits_of(tensor) or ("int8" if tensor.format == "INT8_CHANNEL" else "float")


def make_weight(
    tensors: Sequence[WeightTensor], dtype: torch.dtype, device: torch.device, quantization: str | None
) -> Weight:
    """`tensors` of one layout, one below another. `quantization` rounds what the files hold in floats."""
    layout = layout_of(tensors[0])
    if layout == "int8":
        return _channel_weight(tensors, device)
    if tensors[0].format == "FP8":
        return _fp8_weight(tensors, device)
    if layout == "float":
        matrix = torch.empty(
            (sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1]), dtype=dtype, device=device
        )
        start = 0
        for tensor in tensors:
            fill_dense(matrix[start : start + tensor.shape[0]], tensor)
            start += tensor.shape[0]
        if quantization == "int4":
            return quantize_to_int4(matrix)
        return DenseWeight("float", matrix) if quantization is None else quantize_weight(matrix, quantization)
    return pack_codes([grouped_codes(tensor) for tensor in tensors], device)


def _channel_weight(tensors: Sequence[WeightTensor], device: torch.device) -> DenseWeight:
    codes, scales = [], []
    for tensor in tensors:
        blocks = np.ascontiguousarray(tensor.data).reshape(tensor.shape[0], -1, 36)
        scales.append(blocks[:, 0, :4].copy().view(np.float32)[:, 0])
        codes.append(blocks[:, :, 4:].reshape(tensor.shape).view(np.int8))
    matrix = torch.from_numpy(np.concatenate(codes)).to(device)
    return DenseWeight("int8", matrix, torch.from_numpy(np.concatenate(scales)).to(device))


def _fp8_weight(tensors: Sequence[WeightTensor], device: torch.device) -> DenseWeight:
    blocks = np.concatenate([np.ascontiguousarray(tensor.data).reshape(tensor.shape[0], -1, 36) for tensor in tensors])
    codes = torch.from_numpy(np.ascontiguousarray(blocks[:, :, 4:]).reshape(len(blocks), -1))
    matrix = codes.to(device).view(torch.float8_e4m3fn)
    scales = np.ascontiguousarray(blocks[:, :, :4]).view(np.float32)[..., 0]
    if (scales == scales[:, :1]).all():
        return DenseWeight("fp8", matrix, torch.from_numpy(scales[:, 0].copy()).to(device))
    by_block = scales[::SCALE_BLOCK, :: SCALE_BLOCK // 32].copy()
    return DenseWeight("fp8_block", matrix, torch.from_numpy(by_block).to(device))


def pack_codes(parts: Sequence[GroupedCodes], device: torch.device) -> PackedWeight:
    bits, group = parts[0].bits, math.gcd(*(part.group for part in parts))
    codes = np.concatenate([part.codes for part in parts])
    num_outputs, num_inputs = codes.shape
    num_codes = 32 // bits
    padding = -num_inputs % (WORDS * num_codes)
    codes = np.pad(codes, ((0, 0), (0, padding)), constant_values=1 << (bits - 1))
    by_code = codes.reshape(num_outputs, -1, num_codes, WORDS).astype(np.uint32)
    shifts = (np.arange(num_codes, dtype=np.uint32) * np.uint32(bits))[:, None]
    words = np.bitwise_or.reduce(by_code << shifts, axis=2).view(np.int32)
    words = np.ascontiguousarray(words.transpose(1, 0, 2))
    scales = np.concatenate([np.repeat(part.scales, part.group // group, axis=1) for part in parts])
    minima = None
    if any(part.minima is not None for part in parts):
        values = [np.zeros_like(part.scales) if part.minima is None else part.minima for part in parts]
        minima = np.concatenate(
            [np.repeat(each, part.group // group, axis=1) for each, part in zip(values, parts, strict=True)]
        )
    return PackedWeight(
        bits,
        group,
        torch.from_numpy(words).to(device),
        _factors(scales, device),
        None if minima is None else _factors(minima, device),
        num_inputs,
    )


def _factors(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """[O, G] -> [G, O] in float16 where that keeps 11 bits of each, else in float32."""
    magnitudes = np.abs(values[values != 0])
    fits = not magnitudes.size or (magnitudes.min() >= 2.0**-14 and magnitudes.max() <= 65504.0)
    turned = np.ascontiguousarray(values.T)
    return torch.from_numpy(turned.astype(np.float16) if fits else turned).to(device)


def quantize_weight(matrix: torch.Tensor, kind: str) -> DenseWeight:
    """Floats [O, I] rounded to nearest, with a scale per output, or per 128 x 128 of them (fp8_block)."""
    values = matrix.float()
    if kind == "fp8_block":
        num_outputs, num_inputs = values.shape
        padded = torch.nn.functional.pad(values, (0, -num_inputs % 128, 0, -num_outputs % 128))
        blocks = padded.reshape(-(-num_outputs // 128), 128, -(-num_inputs // 128), 128)
        scales = (blocks.abs().amax(dim=(1, 3)) / 448.0).clamp_min_(1e-30)
        codes = (blocks / scales[:, None, :, None]).reshape(padded.shape)[:num_outputs, :num_inputs]
        return DenseWeight(kind, codes.contiguous().to(torch.float8_e4m3fn), scales)
    scales = (values.abs().amax(dim=1) / (127.0 if kind == "int8" else 448.0)).clamp_min_(1e-30)
    codes = values / scales[:, None]
    if kind == "int8":
        return DenseWeight(kind, codes.round().to(torch.int8), scales)
    return DenseWeight(kind, codes.to(torch.float8_e4m3fn), scales)


def quantize_to_int4(matrix: torch.Tensor) -> PackedWeight:
    """Floats [O, I] rounded to nearest in groups of 128 inputs, packed as `pack_codes` does on the host."""
    num_outputs, num_inputs = matrix.shape
    if num_inputs % 128:
        raise UnsupportedModelError(f"int4 has a scale for 128 inputs, and a matrix has {num_inputs} inputs")
    groups = matrix.float().reshape(num_outputs, num_inputs // 128, 128)
    scales = (groups.abs().amax(-1) / 7.0).half()
    codes = (groups / scales.float().clamp_min(1e-8)[..., None]).round_().clamp_(-8, 7).to(torch.int32) + 8
    by_code = codes.reshape(num_outputs, num_inputs // 128, 8, WORDS)
    words = torch.zeros((num_outputs, num_inputs // 128, WORDS), dtype=torch.int32, device=matrix.device)
    for i in range(8):
        words |= by_code[:, :, i] << (4 * i)
    return PackedWeight(4, 128, words.transpose(0, 1).contiguous(), scales.t().contiguous(), None, num_inputs)


def stack_experts(experts: Sequence[Weight]) -> Weight:
    """The same matrix of each expert as one weight. Raises `UnsupportedModelError` where layouts differ."""
    first = experts[0]
    if isinstance(first, DenseWeight):
        same = [each for each in experts if isinstance(each, DenseWeight) and each.kind == first.kind]
        if len(same) == len(experts):
            scales = None if first.scales is None else torch.stack([_known(each.scales) for each in same])
            return DenseWeight(first.kind, torch.stack([each.matrix for each in same]), scales)
    else:
        packed = [each for each in experts if isinstance(each, PackedWeight) and each.bits == first.bits]
        if len(packed) == len(experts):
            return _stack_packed(packed)
    raise UnsupportedModelError("the experts of a layer are quantized in different ways, which is not supported")


def _stack_packed(experts: Sequence[PackedWeight]) -> PackedWeight:
    group = math.gcd(*(each.group for each in experts))
    wide = any(each.scales.dtype is torch.float32 for each in experts)

    def factors(each: PackedWeight, values: torch.Tensor | None) -> torch.Tensor:
        values = torch.zeros_like(each.scales) if values is None else values
        return (values.float() if wide else values).repeat_interleave(each.group // group, dim=0)

    has_minima = any(each.minima is not None for each in experts)
    minima = [factors(each, each.minima) for each in experts] if has_minima else []
    if minima and any(each.dtype is torch.float32 for each in minima):
        minima = [each.float() for each in minima]
    return PackedWeight(
        experts[0].bits,
        group,
        torch.stack([each.words for each in experts]),
        torch.stack([factors(each, each.scales) for each in experts]),
        torch.stack(minima) if has_minima else None,
        experts[0].num_inputs,
    )


def _known(scales: torch.Tensor | None) -> torch.Tensor:
    assert scales is not None
    return scales
