"""Linear layers on dense weights, through oneDNN.

oneDNN holds the matrix in its own blocked order (the only copy) and computes every row of x by the same
sums in the same order whatever the number of rows, as long as there are at least two. MKL, behind
`torch.nn.functional.linear`, changes its kernel at 2, 4, 16 and 128 rows, and is half as fast at 4 to 64
rows. Measured in float32; the bfloat16 kernels of oneDNN do change with the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from pelton.weights.dequantize import dequantize
from pelton.weights.tensors import WeightTensor

# oneDNN builds and keeps one kernel per number of rows: round it up to one of a few.
_MAX_ROWS = 512


class DenseLoader:
    """Implements `ops.LinearLoader`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._decoded = torch.empty(0)
        self._converted = torch.empty(0, dtype=dtype)

    def load(self, tensors: Sequence[WeightTensor]) -> torch.Tensor:
        """A tensor in oneDNN's layout."""
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
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix, None)
        return packed


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    num_rows = x.shape[0]
    if num_rows > _MAX_ROWS:
        return torch.cat([linear(part, weight, bias) for part in x.split(_MAX_ROWS)])
    padding = _padded(num_rows) - num_rows
    if padding:
        x = F.pad(x, (0, 0, 0, padding))
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y[:num_rows]


def _padded(num_rows: int) -> int:
    """2, 4, 8, then multiples of 16 up to 128, then multiples of 64."""
    if num_rows <= 8:
        return max(2, 1 << (num_rows - 1).bit_length())
    step = 16 if num_rows <= 128 else 64
    return -(-num_rows // step) * step
