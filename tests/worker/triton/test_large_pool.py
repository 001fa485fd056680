"""A pool beyond 2**31 elements, as an H100's is: offsets in 32 bits would wrap. Few of its pages are ever touched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pelton.worker.kernels.ops import AttentionShape
from pelton.worker.kernels.triton.attention import paged_attention, plan_attention
from pelton.worker.kernels.triton.packed_kv import rotate_and_store_packed
from pelton.worker.kernels.triton.rotary import rotate_and_store
from pelton.worker.kv_format import KV_FORMATS

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:overflow encountered")]

BLOCK_SIZE, HEADS, KV_HEADS, HEAD_DIM = 16, 4, 2, 64
SHAPE = AttentionShape(HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, None)


@pytest.mark.parametrize("name", ["bfloat16", "fp8", "int4"])
def test_the_last_blocks_of_a_large_pool_are_written_and_read(name: str) -> None:
    kv_format = KV_FORMATS[name]
    block_shape = kv_format.block_shape(BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    num_blocks = 2**31 // int(np.prod(block_shape)) + 9
    results = []
    for last in (3, num_blocks - 1):
        # Keys and values share a pool, in blocks of their own.
        pool = torch.empty((last + 1, *block_shape), dtype=getattr(torch, kv_format.array_dtype))
        torch.manual_seed(0)
        heads = torch.randn(20, HEADS + 2 * KV_HEADS, HEAD_DIM).bfloat16()
        query, key, value = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        angles = torch.zeros(20, HEAD_DIM // 2)
        blocks = np.array([last, last - 1])
        slots = torch.from_numpy(np.concatenate([blocks[0] * 16 + np.arange(16), blocks[1] * 16 + np.arange(4)]))
        store = rotate_and_store_packed if kv_format.is_packed else rotate_and_store
        turned = store(query, key, value, angles, angles, pool, pool, slots.to(torch.int32))
        plan = plan_attention(SHAPE, np.array([0, 20]), np.array([20]), torch.from_numpy(blocks[None, :]))
        results.append(paged_attention(turned, pool, pool, plan, 0.125))
    assert results[0].isfinite().all()
    assert torch.equal(results[0], results[1])
