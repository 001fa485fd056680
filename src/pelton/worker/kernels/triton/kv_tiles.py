"""Keys and values of a tile as kernels read them from a cache of any format (worker/kv_format.py).

A scale belongs to a whole row of a tile, so it is a factor of scores (keys) and of weights (values), and products
take the codes as they are: every code of 8 bits or less is exact in bfloat16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pelton.worker.kv_format import BY_ARRAY_DTYPE, KVFormat

DENSE = tl.constexpr(0)
FP8 = tl.constexpr(1)
INT8 = tl.constexpr(2)
INT4 = tl.constexpr(3)
_NUMBERS = {"fp8": FP8, "int8": INT8, "int4": INT4}


@triton.jit
def load_codes(
    at,
    is_read,
    FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Rows `at` (pointers [P]) as [P, BLOCK_D] of type PRODUCT; zeros where not `is_read` and from HEAD_DIM on."""
    if FORMAT == INT4:
        byte = tl.arange(0, BLOCK_D // 2)
        mask = is_read[:, None] & (byte[None, :] < HEAD_DIM // 2)
        pairs = tl.load(at[:, None] + byte[None, :], mask=mask, other=0)
        codes = tl.interleave(pairs & 15, pairs >> 4).to(PRODUCT)
    else:
        dim = tl.arange(0, BLOCK_D)
        mask = is_read[:, None] & (dim[None, :] < HEAD_DIM)
        stored = tl.load(at[:, None] + dim[None, :], mask=mask, other=0)
        if FORMAT == FP8:
            codes = stored.to(tl.float8e4nv, bitcast=True).to(PRODUCT)
        elif FORMAT == INT8:
            codes = stored.to(tl.int8, bitcast=True).to(PRODUCT)
        else:
            codes = stored.to(PRODUCT)
    return codes


@triton.jit
def load_scales(scales, at, is_read, FORMAT: tl.constexpr):
    """(scale, minimum) of rows `at` [P], counted in scales; the minimum of formats without one is the scale."""
    if FORMAT == INT4:
        factor = tl.load(scales + at * 2, mask=is_read, other=0.0).to(tl.float32)
        minimum = tl.load(scales + at * 2 + 1, mask=is_read, other=0.0).to(tl.float32)
    else:
        factor = tl.load(scales + at, mask=is_read, other=0.0)
        minimum = factor
    return factor, minimum


def format_of(cache: torch.Tensor) -> KVFormat:
    """By the type of its array."""
    return BY_ARRAY_DTYPE[str(cache.dtype).removeprefix("torch.")]


def format_number(kv_format: KVFormat) -> int:
    """As kernels know it."""
    return int(_NUMBERS.get(kv_format.name, DENSE).value)


def codes_and_scales(cache: torch.Tensor, codes_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views of a cache's memory as kernels want them: [num_blocks, bytes] of codes, and scales, which a dense
    cache has none of: there both are the cache itself."""
    kv_format = format_of(cache)
    if not kv_format.is_packed:
        return cache, cache
    stored = cache.view(torch.uint8)
    return stored, stored[:, codes_bytes:].view(torch.float16 if kv_format.name == "int4" else torch.float32)
