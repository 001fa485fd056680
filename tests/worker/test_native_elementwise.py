"""Norms, activations and rotary embedding of the native kernels on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch

from tests.worker.native import ISAS, OnTensors, on_tensors

pytestmark = pytest.mark.torch

# Around vectors of 16, and the sizes of real models.
SIZES = [1, 2, 15, 16, 17, 31, 33, 64, 100, 896, 4864]


@pytest.fixture(params=ISAS)
def kernels(request: pytest.FixtureRequest) -> OnTensors:
    torch.manual_seed(0)
    return on_tensors(request.param)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(kernels: OnTensors, size: int) -> None:
    x, residual, weight = torch.randn(5, size) * 3, torch.randn(5, size), torch.randn(size)
    wide = x.double()
    assert_near(kernels.rms_norm(x, weight, 1e-6), wide / (wide.square().mean(-1, True) + 1e-6).sqrt() * weight)
    total = wide + residual.double()
    normed, new_residual = kernels.add_rms_norm(x, residual.clone(), weight, 0.1)
    assert torch.equal(new_residual, x + residual)
    assert_near(normed, total / (total.square().mean(-1, True) + 0.1).sqrt() * weight)


def test_rms_norm_of_extremes(kernels: OnTensors) -> None:
    x = torch.zeros(4, 33)
    x[1], x[2, 5], x[3] = 1e-25, math.nan, 1e15
    result = kernels.rms_norm(x, torch.ones(33), 1e-6)
    assert not result[0].any()
    assert result[1].isfinite().all()
    assert result[2].isnan().all()
    assert_near(result[3], torch.ones(33).double())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", ["silu_mul", "gelu_tanh_mul"])
def test_gated_activations(kernels: OnTensors, op: str, size: int) -> None:
    values = torch.cat(
        [torch.linspace(-30, 30, 400), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e20, -1e20, -88.0, 88.0])]
    )
    values = torch.cat([values, torch.tensor([3.4e38, -3.4e38, -104.0, -200.0, 200.0])])
    gate = values[torch.arange(9 * size).remainder(len(values))].view(9, size)
    up = torch.randn(9, size)
    wide = gate.double()
    if op == "silu_mul":
        expected = wide * torch.sigmoid(wide) * up
    else:
        expected = 0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))) * up
    result = getattr(kernels, op)(torch.cat([gate, up], dim=1))
    fits = expected.abs() < 3e38
    assert result[fits].isfinite().all()
    # Half an ulp of 1 + tanh is what is left of gelu far below zero.
    bound = 2e-6 * expected.abs() + 2e-6 * up.abs().double() * wide.abs().clamp(max=10)
    assert ((result.double() - expected).abs() <= bound)[fits].all()


@pytest.mark.parametrize("op", ["silu_mul", "gelu_tanh_mul"])
def test_nan_gates_stay_where_they_are(kernels: OnTensors, op: str) -> None:
    gate_up = torch.randn(3, 2 * 37)
    expected = getattr(kernels, op)(gate_up)
    gate_up[1, 20] = math.nan
    result = getattr(kernels, op)(gate_up)
    assert result[1, 20].isnan()
    result[1, 20] = expected[1, 20]
    assert torch.equal(result, expected)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_rows_do_not_depend_on_their_company(kernels: OnTensors, num_threads: int) -> None:
    x, weight = torch.randn(40, 2 * 99), torch.randn(2 * 99)
    threaded = on_tensors(kernels.runtime.isa, num_threads)
    for op in ("silu_mul", "gelu_tanh_mul", "rms_norm"):
        arguments = (weight, 1e-6) if op == "rms_norm" else ()
        expected = getattr(kernels, op)(x, *arguments)
        assert torch.equal(getattr(threaded, op)(x, *arguments), expected)
        for num_rows in (1, 3, 16):
            assert torch.equal(getattr(threaded, op)(x[7 : 7 + num_rows], *arguments), expected[7 : 7 + num_rows])


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(2, 2), (33, 20), (40, 40), (64, 64), (80, 34), (256, 256)])
def test_rotate_and_store(kernels: OnTensors, head_dim: int, rotary_dim: int, cache_dtype: torch.dtype) -> None:
    heads = torch.randn(9, 7, head_dim)
    angles = torch.rand(9, rotary_dim // 2) * 1000
    slots = torch.randperm(40)[:9]
    half = rotary_dim // 2
    first, second = heads[..., :half].double(), heads[..., half:rotary_dim].double()
    cos, sin = angles.cos(), angles.sin()
    c, s = cos.double()[:, None], sin.double()[:, None]
    turned = torch.cat([first * c - second * s, second * c + first * s, heads[..., rotary_dim:].double()], dim=-1)
    results = []
    for num_threads in (1, 2):
        caches = torch.full((2, 8, 5, 2, head_dim), 7.0, dtype=cache_dtype)
        query, key, value = heads.clone().split([3, 2, 2], dim=1)
        rotated = on_tensors(kernels.runtime.isa, num_threads).rotate_and_store(
            query, key, value, cos, sin, caches[0], caches[1], slots
        )
        results.append((rotated, caches))
        assert_near(rotated, turned[:, :3])
        flat = caches.flatten(1, 2)
        assert_near(flat[0, slots], turned[:, 3:5], 2e-6 if cache_dtype is torch.float32 else 0.004)
        assert torch.equal(flat[1, slots], heads[:, 5:].to(cache_dtype))  # rounded to nearest even, as torch does
        others = torch.ones(40, dtype=torch.bool).index_fill_(0, slots, False)
        assert (flat[:, others] == 7).all()
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_stored_extremes(kernels: OnTensors) -> None:
    """NaN, infinities and ties of bfloat16 are stored as torch rounds them."""
    value = torch.tensor([math.nan, math.inf, -math.inf, 3.4e38, 1.00390625, 1.01171875, -0.0, 1e-30]).view(1, 1, 8)
    caches = torch.zeros(2, 1, 1, 1, 8, dtype=torch.bfloat16)
    nothing = torch.zeros(1, 0)
    kernels.rotate_and_store(
        value.clone(), value.clone(), value, nothing, nothing, caches[0], caches[1], torch.tensor([0])
    )
    expected = value.bfloat16().view(8)
    for stored in caches.view(2, 8):
        assert stored.isnan().tolist() == expected.isnan().tolist()
        assert torch.equal(stored.nan_to_num(0.0, math.inf, -math.inf), expected.nan_to_num(0.0, math.inf, -math.inf))
