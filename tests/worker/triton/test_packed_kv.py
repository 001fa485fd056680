"""Packed caches, interpreted: what is written, what attention makes of it, and law 3 against itself."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pelton.core.batch import KVOp, KVOpKind
from pelton.core.errors import ConfigError
from pelton.core.model_spec import ModelSpec, RopeSpec, make_kv_groups
from pelton.worker.kernels.ops import make_kernels
from pelton.worker.kernels.triton.attention import paged_attention
from pelton.worker.kernels.triton.kv_tiles import codes_and_scales
from pelton.worker.kernels.triton.packed_kv import packed_block_size, rotate_and_store_packed
from pelton.worker.kv_format import KV_FORMATS
from pelton.worker.kv_storage import KVStorage
from pelton.worker.models.registry import make_dummy_model
from tests.worker.tiny_models import PagedModel
from tests.worker.triton.attention_case import SMALL, Requests

pytestmark = pytest.mark.torch

PACKED = [name for name, kv_format in KV_FORMATS.items() if kv_format.is_packed]
# Of a head's largest value. The interpreter cuts fp8 where a GPU rounds.
STEPS = {"fp8": 1 / 8, "int8": 0.5 / 127, "int4": 1.01 / 15}


def empty_packed(name: str, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> torch.Tensor:
    """Two caches of bytes that are NaN as scales."""
    kv_format = KV_FORMATS[name]
    (num_bytes,) = kv_format.block_shape(block_size, num_kv_heads, head_dim)
    caches = torch.full((2, num_blocks, num_bytes), 0xFF, dtype=torch.uint8)
    return caches.view(getattr(torch, kv_format.array_dtype))


def decode(cache: torch.Tensor, name: str, block_size: int, num_kv_heads: int, head_dim: int) -> torch.Tensor:
    """float32 [num_blocks, block_size, K, D]."""
    codes_bytes = KV_FORMATS[name].codes_bytes(block_size, num_kv_heads, head_dim)
    codes, scales = codes_and_scales(cache, codes_bytes)
    rows = block_size * num_kv_heads
    if name == "int4":
        packed = codes[:, : rows * head_dim // 2].reshape(len(codes), rows, -1)
        values = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(2).float()
        pairs = scales[:, : 2 * rows].float().view(len(codes), rows, 2, 1)
        decoded = values * pairs[:, :, 0] + pairs[:, :, 1]
    else:
        stored = codes[:, : rows * head_dim].view(torch.float8_e4m3fn if name == "fp8" else torch.int8)
        decoded = stored.float().view(len(codes), rows, head_dim) * scales[:, :rows].unsqueeze(-1)
    return decoded.view(len(codes), block_size, num_kv_heads, head_dim)


def write(requests: Requests, name: str, rotary_dim: int = 0) -> torch.Tensor:
    """The requests' caches packed; their queries become what the write returns for those."""
    shape = requests.shape
    slots = torch.unique(torch.cat(requests.slots))
    keys, values = requests.caches.flatten(1, 2)[:, slots]
    caches = empty_packed(name, len(requests.caches[0]), shape.block_size, shape.num_kv_heads, shape.head_dim)
    angles = torch.zeros(len(slots), rotary_dim // 2)
    queries = torch.cat(requests.queries)
    padded = torch.cat([queries, queries.new_zeros(len(slots) - len(queries), *queries.shape[1:])])
    turned = rotate_and_store_packed(padded, keys, values, angles.cos(), angles.sin(), *caches, slots)
    requests.queries = list(turned[: len(queries)].split([len(query) for query in requests.queries]))
    return caches


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (96, 64), (80, 0)])
def test_what_is_written(name: str, head_dim: int, rotary_dim: int) -> None:
    torch.manual_seed(0)
    heads = torch.randn(5, 6, head_dim) * torch.logspace(-3, 2, 5).view(-1, 1, 1)  # 2 query heads, 2, 2
    heads[1, 3] = 0.0
    heads[2, 4] = 7.0  # all alike
    angles = torch.rand(5, rotary_dim // 2) * 100
    caches = empty_packed(name, 4, 16, 2, head_dim)
    slots = torch.tensor([17, 63, -1, 0, 33])
    query, key, value = heads.split(2, dim=1)
    rotated = rotate_and_store_packed(query, key, value, angles.cos(), angles.sin(), *caches, slots)
    turns = torch.polar(torch.ones(1), angles)[:, None]
    half = rotary_dim // 2
    pairs = torch.complex(heads[:, :4, :half], heads[:, :4, half:rotary_dim]) * turns
    expected = torch.cat([pairs.real, pairs.imag, heads[:, :4, rotary_dim:]], dim=-1)
    is_turned = name == "int4" and head_dim == 64
    if not is_turned:
        assert torch.allclose(rotated, expected[:, :2], rtol=1e-5, atol=1e-5)
    keys, values = (decode(cache, name, 16, 2, head_dim) for cache in caches)
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        wanted = expected[row, 2:]
        key_row, value_row = keys[slot // 16, slot % 16], values[slot // 16, slot % 16]
        bound = 2 * STEPS[name] * value[row].abs().amax(-1, keepdim=True) + 1e-7
        assert ((value_row - value[row]).abs() <= bound).all()
        if is_turned:
            # Products are what they were, but for the rounding of keys.
            found, exact = rotated[row] @ key_row.T, expected[row, :2] @ wanted.T
            error = STEPS[name] * wanted.norm(dim=-1) * expected[row, :2].norm(dim=-1).amax()
            assert ((found - exact).abs() <= error).all()
        else:
            assert ((key_row - wanted).abs() <= 2 * STEPS[name] * wanted.abs().amax(-1, keepdim=True) + 1e-7).all()
    # Nothing else was: scales of other slots are still NaN.
    for cache in caches:
        scales = codes_and_scales(cache, KV_FORMATS[name].codes_bytes(16, 2, head_dim))[1]
        assert scales.isfinite().sum() == 4 * 2 * (2 if name == "int4" else 1)


@pytest.mark.parametrize(
    ("name", "heads", "window", "softcap"),
    [*((name, (2, 1, 64), None, None) for name in PACKED), ("int4", (2, 2, 80), 20, 5.0)],
)
def test_attention(name: str, heads: tuple[int, int, int], window: int | None, softcap: float | None) -> None:
    """Against float64 attention over what the caches say, and bit for bit in another company."""
    requests = Requests([(1, 40), (6, 36), (2, 20)], heads, window=window)
    # What may be read is written; packed zeros stand where nothing is.
    requests.caches.nan_to_num_(0.0)
    caches = write(requests, name)
    shape = requests.shape
    decoded = torch.stack([decode(c, name, shape.block_size, shape.num_kv_heads, shape.head_dim) for c in caches])
    query = torch.cat(requests.queries)

    def attend(plan_parts: list[tuple[int, int, int]], rows: torch.Tensor, num_programs: int) -> torch.Tensor:
        plan = requests.plan(plan_parts, replace(SMALL, num_programs=num_programs))
        return paged_attention(rows, *caches, plan, 0.3, softcap)

    result = attend([(0, 0, 1), (1, 0, 6), (2, 0, 2)], query, 6)
    expected = torch.cat([requests.expected(row, 0.3, softcap, caches=decoded) for row in range(3)])
    assert (result.double() - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert torch.equal(attend([(0, 0, 1)], query[:1], 1), result[:1])
    assert torch.equal(attend([(1, 5, 6)], query[6:7], 100), result[6:7])


@pytest.mark.parametrize("name", PACKED)
def test_packing_changes_attention_little(name: str) -> None:
    """Beside float32 caches, with keys that have dimensions far larger than the rest, as real ones do."""
    requests = Requests([(4, 40)], (2, 1, 64))
    requests.caches[0][..., ::16] *= 12.0
    exact = requests.expected(0, scale=0.03)
    caches = write(requests, name)
    result = paged_attention(requests.queries[0], *caches, requests.plan([(0, 0, 4)]), 0.03)
    error = (result.double() - exact).norm() / exact.norm()
    assert error < {"fp8": 0.08, "int8": 0.02, "int4": 0.12}[name]


def test_blocks_have_their_size_and_nothing_else() -> None:
    for name in PACKED:
        kv_format = KV_FORMATS[name]
        for block_size in (1, 5, 16, 32, 300):
            for num_kv_heads, head_dim in ((1, 64), (3, 80), (8, 128), (4, 256)):
                (num_bytes,) = kv_format.block_shape(block_size, num_kv_heads, head_dim)
                assert num_bytes % 16 == 0
                assert packed_block_size(kv_format, num_bytes, num_kv_heads, head_dim) == block_size
                with pytest.raises(ValueError, match="are no block"):
                    packed_block_size(kv_format, num_bytes + 8, num_kv_heads, head_dim)


def test_odd_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype is int8, which packs heads of even size, not of 33"):
        KV_FORMATS["int8"].block_shape(16, 1, 33)


def make_spec(windows: list[int | None]) -> ModelSpec:
    return ModelSpec(
        architecture="qwen3",
        num_layers=len(windows),
        hidden_size=32,
        intermediate_size=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        vocab_size=40,
        max_model_len=64,
        rms_norm_eps=1e-6,
        rope=RopeSpec(theta=1e4, rotary_dim=32),
        kv_groups=make_kv_groups(windows),
    )


def _pair(storage: KVStorage, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    cache = storage.layer_cache(layer_id)
    return cache.keys, cache.values


@pytest.mark.parametrize("name", PACKED)
def test_blocks_take_their_scales_along(name: str) -> None:
    """Copied within the cache, to host memory and back."""
    spec = make_spec([None, 8])
    storage = KVStorage(spec, 6, 4, name, make_kernels("triton"), num_host_blocks=2)
    assert storage.num_bytes == 6 * KV_FORMATS[name].block_bytes(spec, 4)
    caches = [cache.view(torch.uint8) for layer in range(2) for cache in _pair(storage, layer)]
    for cache in caches:
        cache.random_(0, 256)
    block = [cache[2].clone() for cache in caches]
    moves = [KVOp(KVOpKind.COPY, 2, 5), KVOp(KVOpKind.STORE, 2, 1, "host"), KVOp(KVOpKind.LOAD, 1, 3, "host")]
    storage.move(moves).wait()
    for cache, wanted in zip(caches, block, strict=True):
        assert torch.equal(cache[5], wanted)
        assert torch.equal(cache[3], wanted)


@pytest.mark.parametrize("name", PACKED)
def test_a_model(name: str) -> None:
    """Near what it says over a float32 cache, in one chunk and in several. Bits are compared above: interpreted
    products are numpy's, whose sums may depend on the number of rows."""
    model = make_dummy_model(make_spec([None, 8]), make_kernels("triton"))
    token_ids = torch.randint(0, 40, (20,), generator=torch.Generator().manual_seed(1)).tolist()

    def logits(kv_dtype: str, chunk: int) -> torch.Tensor:
        paged = PagedModel(model, num_blocks=20, block_size=4, kv_dtype=kv_dtype)
        return paged.run(paged.add(token_ids), chunk)

    exact = logits("float32", 20)
    for chunk in (20, 7):
        assert (logits(name, chunk) - exact).norm() / exact.norm() < {"fp8": 0.1, "int8": 0.02, "int4": 0.25}[name]


def test_bytes_of_a_token() -> None:
    """Of one head: half of bfloat16 and a scale, and a quarter and a scale."""
    sizes = {name: math.prod(KV_FORMATS[name].block_shape(16, 1, 128)) // 16 for name in PACKED}
    assert sizes == {"fp8": 132, "int8": 132, "int4": 68}
    assert np.prod(KV_FORMATS["bfloat16"].block_shape(16, 1, 128)) * 2 // 16 == 256
