"""The pool of KV blocks."""

from __future__ import annotations

import sys

import pytest

from pelton.core.batch import KVOp, KVOpKind
from pelton.core.model_spec import ModelSpec, RopeSpec, make_kv_groups
from pelton.worker.kernels.cpu.backend import NativeKernels
from pelton.worker.kernels.ops import Kernels, make_kernels
from pelton.worker.kv_storage import KVStorage
from tests.worker.native import CPU_BACKENDS

pytestmark = pytest.mark.torch


def make_spec(windows: list[int | None]) -> ModelSpec:
    return ModelSpec(
        architecture="gemma3",
        num_layers=len(windows),
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=100,
        max_model_len=64,
        rms_norm_eps=1e-6,
        rope=RopeSpec(theta=1e4, rotary_dim=8),
        kv_groups=make_kv_groups(windows),
    )


@pytest.fixture(params=CPU_BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return make_kernels(request.param)


def make_storage(
    windows: list[int | None], kernels: Kernels, num_blocks: int = 6, block_size: int = 4, dtype: str = "float32"
) -> KVStorage:
    return KVStorage(make_spec(windows), num_blocks, block_size, dtype, kernels)


@pytest.mark.parametrize(("dtype", "element_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_layer_caches_share_one_pool(kernels: Kernels, dtype: str, element_bytes: int) -> None:
    """Five windowed layers and one full one: groups of one layer, all in the memory of one layer."""
    windows: list[int | None] = [8, 8, None, 8, 8, 8]
    storage = make_storage(windows, kernels, dtype=dtype)
    caches = [storage.layer_cache(layer) for layer in range(6)]
    keys, values = caches[2].keys, caches[2].values
    assert tuple(keys.shape) == tuple(values.shape) == (6, 4, 2, 8)
    block_bytes = make_spec(windows).kv_bytes_per_block(4, element_bytes)
    assert storage.num_bytes == 6 * block_bytes == keys.nbytes + values.nbytes
    caches[0].keys[3, 2] = 1
    assert all((cache.keys[3, 2] == 1).all() for cache in caches)
    assert {cache.group_id for cache in caches} == set(range(6))


def test_layers_of_a_group_do_not_overlap(kernels: Kernels) -> None:
    storage = make_storage([None, None, None], kernels)
    caches = [storage.layer_cache(layer) for layer in range(3)]
    for layer, cache in enumerate(caches):
        cache.keys[...] = layer
        cache.values[...] = layer + 10
    for layer, cache in enumerate(caches):
        assert (cache.keys == layer).all()
        assert (cache.values == layer + 10).all()
        assert cache.group_id == 0


def test_groups_of_layers_agree_with_the_spec(kernels: Kernels) -> None:
    windows: list[int | None] = [8, None, 8, 8, None, 8]
    storage = make_storage(windows, kernels)
    for index, group in enumerate(make_spec(windows).kv_groups):
        assert [storage.layer_cache(layer).group_id for layer in group.layer_ids] == [index] * len(group.layer_ids)


def test_moves_copy_every_layer_in_order(kernels: Kernels) -> None:
    storage = make_storage([None, None], kernels)
    caches = [storage.layer_cache(layer) for layer in range(2)]
    for layer, cache in enumerate(caches):
        for place, array in enumerate((cache.keys, cache.values)):
            for block in range(6):
                array[block] = 100 * layer + 10 * place + block
    storage.move(KVOp(KVOpKind.COPY, source, destination) for source, destination in [(1, 3), (3, 5), (2, 3)])
    for layer, cache in enumerate(caches):
        for place, array in enumerate((cache.keys, cache.values)):
            held = (array[:, 0, 0, 0] - 100 * layer - 10 * place).tolist()
            assert held == [0, 1, 2, 2, 4, 1]
            assert (array == array[:, :1, :1, :1]).all()


def resident_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_not_touched_before_use(kernels: Kernels) -> None:
    before = resident_bytes()
    storage = make_storage([None] * 4, kernels, num_blocks=1 << 16, block_size=64)
    assert storage.num_bytes == 2 << 30
    storage.layer_cache(3).values[-1] = 1.0
    assert resident_bytes() - before < 10e6


def test_taking_memory_changes_nothing_that_is_written(kernels: Kernels) -> None:
    storage = make_storage([None, 8], kernels)
    storage._data[:] = 7
    thread = storage.take_ahead(0)
    assert thread is not None
    thread.join()
    assert (storage._data == 7).all()
    assert storage.take_ahead(storage.num_blocks - 1) is None, "all of it is taken"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_taken_ahead_of_the_blocks_in_use() -> None:
    kernels = NativeKernels(1)
    storage = make_storage([None] * 4, kernels, num_blocks=1 << 16, block_size=64)
    before = resident_bytes()
    for last_block in (0, 1, 5000):
        thread = storage.take_ahead(last_block)
        assert (thread is None) == (last_block == 1)
        if thread is not None:
            thread.join()
        least = (last_block + 1) * storage.num_bytes // storage.num_blocks + 120e6
        assert least < resident_bytes() - before < least + 60e6
