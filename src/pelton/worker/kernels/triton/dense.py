"""Tensors in floats on the device, decoded from a file's bytes or made up there."""

from __future__ import annotations

import torch

from pelton.weights.dequantize import dequantize
from pelton.weights.random_tensor import RandomTensor
from pelton.weights.tensors import WeightTensor

_ROWS = 8192  # decoded at a time


def load_dense(tensor: WeightTensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[rows, columns], or [size]."""
    out = torch.empty(tensor.shape, dtype=dtype, device=device)
    fill_dense(out, tensor)
    return out


def fill_dense(out: torch.Tensor, tensor: WeightTensor) -> None:
    """The values of `tensor` into `out`, of its shape."""
    if isinstance(tensor, RandomTensor):
        if out.device.type == "cuda":
            out.normal_(tensor.mean, tensor.std, generator=torch.Generator(out.device).manual_seed(tensor.seed))
        else:
            out.copy_(torch.from_numpy(dequantize(tensor)))
        return
    for first in range(0, tensor.shape[0], _ROWS):
        rows = slice(first, first + _ROWS)
        out[rows] = torch.from_numpy(dequantize(tensor, rows=rows))
