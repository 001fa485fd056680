"""Token embedding straight from the file's bytes: a step needs a few rows, not a decoded table."""

from __future__ import annotations

import torch

from pelton.weights.dequantize import dequantize_rows
from pelton.weights.tensors import WeightTensor


def embedding(token_ids: torch.Tensor, table: WeightTensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    rows = torch.from_numpy(dequantize_rows(table, token_ids.numpy())).to(dtype)
    return rows if scale == 1.0 else rows.mul_(torch.tensor(scale, dtype=dtype))
