"""Linear layers on dense weights, through oneDNN.

oneDNN holds the matrix in its own blocked order (the only copy) and sums up every row of x in the same
order whatever the number of rows, within these bounds, found by trial (the tests repeat it): from 2 rows
on in float32 and float16, up to 32 in bfloat16. MKL, behind `torch.nn.functional.linear`, changes its
kernel at 2, 4, 16 and 128 rows, and is half as fast at 4 to 64 rows. Where oneDNN is not built in, or
lacks the dtype on this CPU, the matrix stays as it is and rows are multiplied _TILE_ROWS at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from pelton.weights.dequantize import dequantize
from pelton.weights.tensors import WeightTensor

_MAX_ROWS = {torch.float32: 512, torch.float16: 512, torch.bfloat16: 32}
_TILE_ROWS = 16


class DenseLoader:
    """Implements `ops.LinearLoader`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._decoded = torch.empty(0)
        self._converted = torch.empty(0, dtype=dtype)

    def load(self, tensors: Sequence[WeightTensor]) -> torch.Tensor:
        """A tensor in oneDNN's layout, or a dense one [O, I]."""
        in_features = tensors[0].shape[1]
        shape = (sum(tensor.shape[0] for tensor in tensors), in_features)
        num_values = shape[0] * in_features
        if self._decoded.numel() < num_values:
            self._decoded = torch.empty(num_values)
            self._converted = torch.empty(0 if self._dtype is torch.float32 else num_values, dtype=self._dtype)
        matrix = self._decoded[:num_values].view(shape)
        start = 0
        for tensor in tensors:
            dequantize(tensor, out=matrix[start : start + tensor.shape[0]].numpy())
            start += tensor.shape[0]
        if self._dtype is not torch.float32:
            matrix = self._converted[:num_values].view(shape).copy_(matrix)
        if not has_onednn(self._dtype):
            return matrix.clone()
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix, None)
        return packed


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of `dtype` here."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    num_rows = x.shape[0]
    max_rows = _MAX_ROWS[x.dtype] if weight.is_mkldnn else _TILE_ROWS
    if num_rows > max_rows:
        return torch.cat([linear(part, weight, bias) for part in x.split(max_rows)])
    padding = (_padded(num_rows) if weight.is_mkldnn else _TILE_ROWS) - num_rows
    if padding:
        x = F.pad(x, (0, 0, 0, padding))
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)[:num_rows]
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y[:num_rows]


def _padded(num_rows: int) -> int:
    """2, 4, 8, then multiples of 16 up to 128, then multiples of 64: oneDNN builds and keeps a kernel for
    every number of rows that it meets."""
    if num_rows <= 8:
        return max(2, 1 << (num_rows - 1).bit_length())
    step = 16 if num_rows <= 128 else 64
    return -(-num_rows // step) * step
