"""Norms, rotary embedding with the KV write, activations and embedding against float64 formulas;
and law 3: a row is the same, bit for bit, alone and among others."""

from __future__ import annotations

import math

import pytest
import torch

from pelton.worker.kernels.triton.activation import gelu_tanh_mul, silu_mul, softcap
from pelton.worker.kernels.triton.embedding import embedding, put_late_tokens
from pelton.worker.kernels.triton.norm import add_rms_norm, rms_norm
from pelton.worker.kernels.triton.rotary import rotate_and_store, split_heads

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:overflow encountered")]

# The interpreter cuts float32 to bfloat16 where a GPU rounds.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 5e-4}
DTYPES = list(TOLERANCES)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype is dtype
    assert (actual.double() - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max().clamp(min=1e-3)


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 37, 64, 896, 2500])
def test_rms_norm(width: int, dtype: torch.dtype) -> None:
    x = (torch.randn(7, width) * torch.tensor([1e-6, 1e-2, 1.0, 30.0, 1e3, 1.0, 0.0]).unsqueeze(1)).to(dtype)
    weight = torch.randn(width)
    assert_near(rms_norm(x, weight, 1e-6), normed(x, weight, 1e-6), dtype)
    for row in (0, 3, 6):
        assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-6)[0], rms_norm(x, weight, 1e-6)[row])
    assert rms_norm(x[:0], weight, 1e-6).shape == (0, width)


def test_rms_norm_of_heads_that_lie_apart() -> None:
    """Views of one matrix, as they come out of the projection of queries, keys and values."""
    weight = torch.randn(24)
    for view in split_heads(torch.randn(5, (6 + 2 * 2) * 24), 6, 2):
        assert_near(rms_norm(view, weight, 1e-5), normed(view, weight, 1e-5), torch.float32)
        assert torch.equal(rms_norm(view[3:4], weight, 1e-5), rms_norm(view, weight, 1e-5)[3:4])


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_rounds_the_sum_before_it_is_normed(dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(3, 130).to(dtype), (10 * torch.randn(3, 130)).to(dtype), torch.randn(130)
    total = (x.float() + residual.float()).to(dtype)
    result, kept = add_rms_norm(x, residual, weight, 1e-5)
    assert_near(kept, total.double(), dtype)
    assert_near(result, normed(kept, weight, 1e-5), dtype)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[1]
    x, cos, sin = x.double(), cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


@pytest.mark.parametrize(
    ("heads", "head_dim", "rotary_dim"), [((4, 2), 16, 16), ((14, 2), 64, 64), ((3, 3), 40, 24), ((2, 1), 256, 256)]
)
@pytest.mark.parametrize(("dtype", "cache_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_rotate_and_store(
    heads: tuple[int, int], head_dim: int, rotary_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    num_heads, num_kv_heads = heads
    qkv = torch.randn(5, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    query, key, value = split_heads(qkv, num_heads, num_kv_heads)
    angles = torch.rand(5, 2, rotary_dim // 2) * 100
    cos, sin = angles.cos()[:, 0], angles.sin()[:, 0]  # rows apart, as tables are laid out
    caches = torch.full((2, 4, 3, num_kv_heads, head_dim), math.nan, dtype=cache_dtype)
    slots = torch.tensor([4, 3, -1, 11, 0], dtype=torch.int32)
    result = rotate_and_store(query, key, value, cos, sin, caches[0], caches[1], slots)
    assert_near(result, rotated(query, cos, sin), dtype)
    flat = caches.flatten(1, 2)
    kept = [0, 1, 3, 4]
    written = slots[kept].long()
    assert_near(flat[0, written], rotated(key, cos, sin)[kept], cache_dtype)
    assert_near(flat[1, written], value[kept].double(), cache_dtype)
    others = [slot for slot in range(12) if slot not in written.tolist()]
    assert flat[:, others].isnan().all()
    alone = rotate_and_store(query[3:4], key[3:4], value[3:4], cos[3:4], sin[3:4], caches[0], caches[1], slots[3:4])
    assert torch.equal(alone, result[3:4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 96, 1500])
def test_gated_activations(width: int, dtype: torch.dtype) -> None:
    gate_up = torch.randn(4, 2 * width).mul_(torch.tensor([0.01, 1.0, 6.0, 60.0]).unsqueeze(1)).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=1)
    for gated, activation in (
        (silu_mul, torch.nn.functional.silu(gate)),
        (gelu_tanh_mul, torch.nn.functional.gelu(gate, approximate="tanh")),
    ):
        result = gated(gate_up)
        for row in range(4):  # each against its own size
            assert_near(result[row], (activation * up)[row], dtype)
            assert torch.equal(gated(gate_up[row : row + 1])[0], result[row])


def test_softcap_keeps_small_values_precise() -> None:
    x = torch.cat([torch.logspace(-6, 4, 2000), -torch.logspace(-6, 4, 2000), torch.zeros(2)]).view(3, -1)
    expected = 30.0 * torch.tanh(x.double() / 30.0)
    result = softcap(x, 30.0)
    assert ((result.double() - expected).abs() <= 1e-6 * expected.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, math.sqrt(96)])
def test_embedding(scale: float, dtype: torch.dtype) -> None:
    table = torch.randn(50, 1100).to(dtype)
    token_ids = torch.tensor([0, 49, 7, 7], dtype=torch.int32)
    expected = table[token_ids.long()] * torch.tensor(scale, dtype=dtype)
    assert_near(embedding(token_ids, table, scale), expected.double(), dtype)


def test_late_tokens_take_their_places() -> None:
    token_ids = torch.tensor([5, 0, 0, 9, 0], dtype=torch.int32)
    put_late_tokens(
        token_ids,
        torch.tensor([-1, 2, 0, -1, 1], dtype=torch.int32),
        torch.tensor([40, -1, 42], dtype=torch.int32),
    )
    assert token_ids.tolist() == [5, 42, 40, 9, 0]  # nothing was sampled in row 1
