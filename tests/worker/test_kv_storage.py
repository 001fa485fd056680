"""The pool of KV blocks."""

from __future__ import annotations

import sys

import pytest
import torch

from pelton.core.model_spec import ModelSpec, RopeSpec, make_kv_groups
from pelton.worker.kv_storage import KVStorage

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


def make_storage(windows: list[int | None], num_blocks: int = 6, block_size: int = 4) -> KVStorage:
    return KVStorage(make_spec(windows), num_blocks, block_size, torch.float32, torch.device("cpu"))


def test_layer_caches_share_one_pool() -> None:
    """Five windowed layers and one full one: groups of one layer, all in the memory of one layer."""
    windows: list[int | None] = [8, 8, None, 8, 8, 8]
    spec = make_spec(windows)
    storage = make_storage(windows)
    keys, values = storage.layer_cache(2)
    assert keys.shape == values.shape == (6, 4, 2, 8)
    assert storage.num_bytes == 6 * spec.kv_bytes_per_block(4, 4) == keys.nbytes + values.nbytes
    assert len({storage.layer_cache(layer)[0].data_ptr() for layer in range(6)}) == 1
    assert {storage.group_of_layer(layer) for layer in range(6)} == set(range(6))


def test_layers_of_a_group_do_not_overlap() -> None:
    storage = make_storage([None, None, None])
    for layer in range(3):
        keys, values = storage.layer_cache(layer)
        keys.fill_(layer)
        values.fill_(layer + 10)
    for layer in range(3):
        keys, values = storage.layer_cache(layer)
        assert (keys == layer).all()
        assert (values == layer + 10).all()
        assert storage.group_of_layer(layer) == 0


def test_group_of_layer_agrees_with_the_spec() -> None:
    windows: list[int | None] = [8, None, 8, 8, None, 8]
    storage = make_storage(windows)
    for index, group in enumerate(make_spec(windows).kv_groups):
        assert [storage.group_of_layer(layer) for layer in group.layer_ids] == [index] * len(group.layer_ids)


def test_copy_blocks_copies_every_layer_in_order() -> None:
    storage = make_storage([None, None])
    for layer in range(2):
        for place, cache in enumerate(storage.layer_cache(layer)):
            for block in range(6):
                cache[block] = 100 * layer + 10 * place + block
    storage.copy_blocks([(1, 3), (3, 5), (2, 3)])
    for layer in range(2):
        for place, cache in enumerate(storage.layer_cache(layer)):
            held = (cache[:, 0, 0, 0] - 100 * layer - 10 * place).tolist()
            assert held == [0, 1, 2, 2, 4, 1]
            assert (cache == cache[:, :1, :1, :1]).all()


def resident_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_not_touched_before_use() -> None:
    before = resident_bytes()
    storage = make_storage([None] * 4, num_blocks=1 << 16, block_size=64)
    assert storage.num_bytes == 2 << 30
    storage.layer_cache(3)[1][-1].fill_(1.0)
    assert resident_bytes() - before < 10e6
