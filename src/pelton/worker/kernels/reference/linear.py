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


class DenseWeight:
    """A matrix [O, I] in oneDNN's layout. Implements `ops.LinearWeight`."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        self.out_features = out_features
        self.in_features = in_features
        self.dtype = dtype
        self.packed: torch.Tensor | None = None

    def load_rows(self, tensors: Sequence[WeightTensor]) -> None:
        """Decodes into a matrix that lives until it has been repacked, no longer."""
        matrix = torch.empty(self.out_features, self.in_features, dtype=self.dtype)
        start = 0
        for tensor in tensors:
            rows = matrix[start : start + tensor.shape[0]]
            if self.dtype is torch.float32:
                dequantize(tensor, out=rows.numpy())
            else:
                rows.copy_(torch.from_numpy(dequantize(tensor)))
            start += tensor.shape[0]
        self.packed = torch.ops.mkldnn._reorder_linear_weight(matrix, None)


def linear(x: torch.Tensor, weight: DenseWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    num_rows = x.shape[0]
    if num_rows > _MAX_ROWS:
        return torch.cat([linear(part, weight, bias) for part in x.split(_MAX_ROWS)])
    padding = _padded(num_rows) - num_rows
    if padding:
        x = F.pad(x, (0, 0, 0, padding))
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.packed, bias, "none", [], "")
    return y[:num_rows]


def _padded(num_rows: int) -> int:
    """2, 4, 8, then multiples of 16 up to 128, then multiples of 64."""
    if num_rows <= 8:
        return max(2, 1 << (num_rows - 1).bit_length())
    step = 16 if num_rows <= 128 else 64
    return -(-num_rows // step) * step
