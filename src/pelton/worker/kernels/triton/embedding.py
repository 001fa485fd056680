"""Rows of the embedding table, and the tokens of a step that were sampled on the device.

Legend: T tokens, V vocabulary, H hidden size, S rows that sampled in the step before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def embedding(token_ids: torch.Tensor, table: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Rows `token_ids` [T] of `table` [V, H] times `scale`, which is rounded to the table's dtype first."""
    width = table.shape[1]
    out = torch.empty((len(token_ids), width), dtype=table.dtype, device=table.device)
    if len(token_ids):
        rounded = float(torch.tensor(scale, dtype=table.dtype))
        block = min(_BLOCK, triton.next_power_of_2(width))
        _embedding_kernel[(len(token_ids), triton.cdiv(width, block))](
            token_ids, table, out, width, rounded, BLOCK=block, num_warps=4
        )
    return out


@triton.jit
def _embedding_kernel(token_ids, table, out, width, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    token_id = tl.load(token_ids + row).to(tl.int64)
    values = tl.load(table + token_id * width + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, (values * scale).to(out.dtype.element_ty), mask=mask)


def put_late_tokens(token_ids: torch.Tensor, late_rows: torch.Tensor, late_tokens: torch.Tensor) -> None:
    """Where `late_rows` [T] is not negative, the token is that row of `late_tokens` [S]; 0 where none was sampled."""
    num_tokens = len(token_ids)
    _late_tokens_kernel[(triton.cdiv(num_tokens, _BLOCK),)](
        token_ids, late_rows, late_tokens, num_tokens, BLOCK=_BLOCK, num_warps=4
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _late_tokens_kernel(token_ids, late_rows, late_tokens, num_tokens, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(late_rows + places, mask=places < num_tokens, other=-1)
    tokens = tl.load(late_tokens + rows, mask=rows >= 0, other=0).to(tl.int32)
    tl.store(token_ids + places, tl.maximum(tokens, 0), mask=rows >= 0)
