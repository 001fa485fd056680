"""Blocks in host memory: what is stored comes back to the bit, in every layer and type."""

from __future__ import annotations

import pytest

from pelton.core.batch import KVOp, KVOpKind
from pelton.worker.kernels.ops import Kernels, make_kernels
from pelton.worker.kv_storage import KVStorage
from tests.worker.native import CPU_BACKENDS
from tests.worker.test_kv_storage import make_spec

pytestmark = pytest.mark.torch


@pytest.fixture(params=CPU_BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return make_kernels(request.param)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_blocks_come_back_to_the_bit(kernels: Kernels, dtype: str) -> None:
    storage = KVStorage(make_spec([None, None, None]), 6, 4, dtype, kernels, num_host_blocks=5)
    caches = storage.layer_caches()
    for layer, cache in enumerate(caches):
        for block in range(6):
            cache.keys[block] = 8 * layer + block
            cache.values[block] = 8 * layer + block + 64
    moves = [
        KVOp(KVOpKind.STORE, 1, 3, "host"),
        KVOp(KVOpKind.STORE, 2, 4, "host"),
        KVOp(KVOpKind.COPY, 5, 1),
        KVOp(KVOpKind.LOAD, 3, 2, "host"),
        KVOp(KVOpKind.LOAD, 4, 5, "host"),
        KVOp(KVOpKind.STORE, 2, 1, "host"),
    ]
    storage.move(moves)
    for layer, cache in enumerate(caches):
        for array, extra in ((cache.keys, 0), (cache.values, 64)):
            held = (array[:, 0, 0, 0] - 8 * layer - extra).tolist()
            assert held[1:] == [5, 1, 3, 4, 2]
            assert (array == array[:, :1, :1, :1]).all()
    assert bytes(storage.host_block(1)) == bytes(storage.host_block(3)) != bytes(storage.host_block(4))


def test_bytes_of_a_host_block_are_those_that_are_loaded(kernels: Kernels) -> None:
    storage = KVStorage(make_spec([None, None]), 6, 4, "bfloat16", kernels, num_host_blocks=3)
    assert storage.host_block(1).nbytes == storage.num_bytes // 6
    storage.layer_cache(0).keys[2] = 1.5
    storage.move([KVOp(KVOpKind.STORE, 2, 1, "host")])
    storage.host_block(2)[:] = bytes(storage.host_block(1))
    storage.move([KVOp(KVOpKind.LOAD, 2, 4, "host")])
    assert (storage.layer_cache(0).keys[4] == storage.layer_cache(0).keys[2]).all()
