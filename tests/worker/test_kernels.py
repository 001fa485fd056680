"""Every op of every backend against plain float64 formulas, and law 3 op by op.

A new backend for CPUs is tested by its row in `CPU_BACKENDS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pelton.core.errors import ConfigError
from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.ops import AttentionShape, Kernels, make_kernels
from tests.worker.native import CPU_BACKENDS, OnTensors

pytestmark = pytest.mark.torch


@pytest.fixture(params=CPU_BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    torch.manual_seed(0)
    return OnTensors(make_kernels(request.param))


# The reference alone computes in these.
NARROW = [torch.bfloat16, torch.float16]
NARROW_REFERENCE = [("reference", dtype) for dtype in NARROW]


def narrow_kernels(dtype: torch.dtype) -> Kernels:
    torch.manual_seed(0)
    return OnTensors(make_kernels("reference", str(dtype).removeprefix("torch.")))


@pytest.fixture(params=["onednn", "plain"])
def matrix_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights as the reference backend holds them on this machine, and as on one without oneDNN."""
    if request.param == "plain":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)


def f32_tensor(values: torch.Tensor) -> WeightTensor:
    return WeightTensor("w", tuple(values.shape), "F32", values.numpy().reshape(-1).view(np.uint8))


def make_weight(kernels: Kernels, matrix: torch.Tensor) -> Any:
    return kernels.make_linear_loader().load([f32_tensor(matrix)])


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    """Within `tolerance` of the largest value expected."""
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-3)


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match="reference"):
        make_kernels("abacus")
    with pytest.raises(ConfigError, match="only native kernels round"):
        make_kernels("reference", activation_dtype="int8")
    with pytest.raises(ConfigError, match="int3 activations"):
        make_kernels(activation_dtype="int3")


def test_auto_is_native_for_float32_only() -> None:
    assert make_kernels().name.startswith("native")
    assert make_kernels(activation_dtype="float32").name.startswith("native")
    assert make_kernels(dtype="bfloat16").name == "reference"
    with pytest.raises(ConfigError, match="bfloat16: use --kernel-backend reference"):
        make_kernels("native", "bfloat16")


def test_num_weight_bytes_bounds_what_is_held(kernels: Kernels) -> None:
    """Of dense weights; packed ones are in test_native_linear.py."""
    tensor = f32_tensor(torch.randn(50, 64))
    assert 50 * 64 * 4 <= kernels.num_weight_bytes(tensor) <= 64 * 64 * 4  # in whole panels
    assert narrow_kernels(torch.bfloat16).num_weight_bytes(tensor) == 50 * 64 * 2


@pytest.mark.usefixtures("matrix_library")
@pytest.mark.parametrize(("out_features", "in_features"), [(1152, 896), (7, 5), (50, 4864)])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 9, 130, 1030])
def test_linear(kernels: Kernels, num_rows: int, out_features: int, in_features: int) -> None:
    x, matrix = torch.randn(num_rows, in_features), torch.randn(out_features, in_features)
    bias = torch.randn(out_features)
    weight = make_weight(kernels, matrix)
    expected = x.double() @ matrix.double().T
    assert kernels.linear(x, weight).shape == expected.shape
    if num_rows:
        assert_near(kernels.linear(x, weight), expected)
        assert_near(kernels.linear(x, weight, bias), expected + bias)


@pytest.mark.usefixtures("matrix_library")
def test_linear_from_several_tensors(kernels: Kernels) -> None:
    """One loader for several weights: what it decodes into must not be what it gives out."""
    loader = kernels.make_linear_loader()
    matrices = [torch.randn(rows, 24) for rows in (10, 3, 5, 40)]
    merged = loader.load([f32_tensor(matrix) for matrix in matrices[:3]])
    single = loader.load([f32_tensor(matrices[3])])
    x = torch.randn(4, 24)
    assert_near(kernels.linear(x, merged), x.double() @ torch.cat(matrices[:3]).double().T)
    assert_near(kernels.linear(x, single), x.double() @ matrices[3].double().T)


@pytest.mark.usefixtures("matrix_library")
@pytest.mark.parametrize("dtype", NARROW)
def test_linear_in_narrow_dtypes(dtype: torch.dtype) -> None:
    kernels = narrow_kernels(dtype)
    x, matrix = torch.randn(20, 128, dtype=dtype), torch.randn(30, 128).to(dtype)
    result = kernels.linear(x, make_weight(kernels, matrix.float()))
    assert result.dtype is dtype
    assert_near(result, x.double() @ matrix.double().T, 0.01 if dtype is torch.bfloat16 else 0.002)


@pytest.mark.usefixtures("matrix_library")
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize(("out_features", "in_features"), [(1152, 896), (896, 4864), (33, 50)])
@pytest.mark.parametrize(("backend", "dtype"), [*[(name, torch.float32) for name in CPU_BACKENDS], *NARROW_REFERENCE])
def test_linear_rows_do_not_depend_on_their_number(
    backend: str, out_features: int, in_features: int, dtype: torch.dtype, num_threads: int
) -> None:
    torch.manual_seed(0)
    kernels = OnTensors(make_kernels(backend, str(dtype).removeprefix("torch."), None))
    x = torch.randn(600, in_features, dtype=dtype)
    weight = make_weight(kernels, torch.randn(out_features, in_features) * 0.03)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        expected = kernels.linear(x, weight)
        for num_rows in (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 127, 128, 129, 500, 512, 513):
            assert torch.equal(kernels.linear(x[-num_rows:], weight), expected[-num_rows:]), num_rows
    finally:
        torch.set_num_threads(threads_before)


def test_embedding(kernels: Kernels) -> None:
    table = torch.randn(20, 12)
    token_ids = torch.tensor([3, 19, 0, 3])
    assert torch.equal(kernels.embedding(token_ids, f32_tensor(table)), table[token_ids])
    narrow = narrow_kernels(torch.bfloat16).embedding(token_ids, f32_tensor(table))
    assert torch.equal(narrow, table[token_ids].bfloat16())
    for bad_id in (20, -1, 10**12):
        with pytest.raises(IndexError):
            kernels.embedding(torch.tensor([3, bad_id]), f32_tensor(table))


def test_embedding_scale_is_rounded_to_the_dtype(kernels: Kernels) -> None:
    """Gemma multiplies by sqrt(hidden size) in its own dtype: 33.94 is 34 in bfloat16."""
    table, token_ids = f32_tensor(torch.ones(2, 4)), torch.tensor([1])
    assert kernels.embedding(token_ids, table, 1152**0.5).tolist() == [[np.float32(1152**0.5)] * 4]
    assert narrow_kernels(torch.bfloat16).embedding(token_ids, table, 1152**0.5).tolist() == [[34.0] * 4]


def test_embedding_of_a_packed_table(kernels: Kernels) -> None:
    """Q8_0: 32 int8 values after their float16 scale."""
    scales = np.linspace(0.01, 0.2, 10, dtype=np.float16).reshape(10, 1)
    values = np.random.default_rng(0).integers(-127, 128, (10, 32), dtype=np.int8)
    packed = np.concatenate([scales.view(np.uint8), values.view(np.uint8)], axis=1).reshape(-1)
    table = WeightTensor("w", (5, 64), "Q8_0", packed)
    rows = kernels.embedding(torch.tensor([4, 1]), table)
    expected = (values * scales.astype(np.float64)).reshape(5, 64)[[4, 1]]
    assert_near(rows, torch.from_numpy(expected))


@pytest.mark.parametrize("shape", [(7, 896), (3, 4, 40), (1, 5)])
def test_rms_norm(kernels: Kernels, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape) * 3, torch.randn(shape[-1])
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight.double()
    assert_near(kernels.rms_norm(x, weight, 0.1), expected)
    residual = torch.randn(shape)
    total = wide + residual.double()
    expected = total / (total.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight.double()
    normed, new_residual = kernels.add_rms_norm(x.clone(), residual.clone(), weight, 0.1)
    assert_near(normed, expected)
    assert_near(new_residual, total)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotary_dim", [8, 6])
@pytest.mark.parametrize("head_dim", [8, 40, 64])
def test_rotate_and_store(kernels: Kernels, head_dim: int, rotary_dim: int, cache_dtype: torch.dtype) -> None:
    heads = torch.randn(3, 7, head_dim)  # views of one projection, as in a model: 3 query heads, 2, 2
    angles = torch.rand(3, rotary_dim // 2) * 100
    caches = torch.zeros(2, 6, 4, 2, head_dim, dtype=cache_dtype)
    expected = heads.double()
    turns = torch.polar(torch.ones(1, dtype=torch.float64), angles.double())[:, None]
    pairs = torch.complex(expected[:, :5, : rotary_dim // 2], expected[:, :5, rotary_dim // 2 : rotary_dim]) * turns
    turned = torch.cat([pairs.real, pairs.imag, expected[:, :5, rotary_dim:]], dim=-1)
    query, key, value = heads.clone().split([3, 2, 2], dim=1)
    slots = torch.tensor([21, 4, 7])
    rotated = kernels.rotate_and_store(query, key, value, angles.cos(), angles.sin(), caches[0], caches[1], slots)
    assert_near(rotated, turned[:, :3])
    assert torch.equal(rotated[..., rotary_dim:], heads[:, :3, rotary_dim:])
    for row, (block, offset) in enumerate([(5, 1), (1, 0), (1, 3)]):
        tolerance = 2e-6 if cache_dtype is torch.float32 else 0.005
        assert_near(caches[0, block, offset], turned[row, 3:], tolerance)
        assert torch.equal(caches[1, block, offset], heads[row, 5:].to(cache_dtype))
    assert caches.count_nonzero() == 3 * 4 * head_dim


def test_rotate_and_store_in_bfloat16() -> None:
    kernels = narrow_kernels(torch.bfloat16)
    heads, angles = torch.randn(3, 7, 16), torch.rand(3, 8) * 100
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        caches = torch.zeros(2, 2, 4, 2, 16, dtype=dtype)
        query, key, value = heads.bfloat16().to(dtype).split([3, 2, 2], dim=1)
        slots = torch.tensor([0, 7, 3])
        rotated = kernels.rotate_and_store(query, key, value, angles.cos(), angles.sin(), caches[0], caches[1], slots)
        assert rotated.dtype is dtype
        results.append((rotated, caches))
    assert_near(results[1][0], results[0][0].double(), 0.01)
    assert_near(results[1][1], results[0][1].double(), 0.01)


def test_inputs_need_not_be_contiguous(kernels: Kernels) -> None:
    wide, weight = torch.randn(6, 80), torch.randn(40)
    sliced, whole = wide[:, 20:60], wide[:, 20:60].contiguous()
    assert torch.equal(kernels.rms_norm(sliced, weight, 0.1), kernels.rms_norm(whole, weight, 0.1))
    for op in (kernels.silu_mul, kernels.gelu_tanh_mul):
        assert torch.equal(op(sliced), op(whole))
    expected = kernels.add_rms_norm(whole.clone(), whole.clone(), weight, 0.1)
    for actual, wanted in zip(
        kernels.add_rms_norm(wide.clone()[:, 20:60], wide.clone()[:, 20:60], weight, 0.1), expected, strict=True
    ):
        assert torch.equal(actual, wanted)
    case = AttentionCase([(3, 20)], (4, 2, 16), None)
    expected_attention = case.run(kernels, scale=0.3)
    case.query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(case.run(kernels, scale=0.3), expected_attention)


def test_slots_and_blocks_that_do_not_exist_are_refused(kernels: Kernels) -> None:
    """A step that is wrong fails; it must not take the process along."""
    heads, angles = torch.randn(1, 3, 8), torch.rand(1, 4)
    caches = torch.zeros(2, 3, 4, 1, 8)
    for slot in (12, 10**9, -(10**6)):
        query, key, value = heads.clone().split(1, dim=1)
        with pytest.raises((IndexError, RuntimeError)):
            kernels.rotate_and_store(
                query, key, value, angles.cos(), angles.sin(), caches[0], caches[1], torch.tensor([slot])
            )
    shape = AttentionShape(1, 1, 8, 4, None)
    for table, seq_len in (([3], 4), ([10**9], 1), ([-(10**6)], 1), ([1], 5)):
        tables = torch.tensor([table])
        with pytest.raises((IndexError, RuntimeError)):
            _plan_and_attend(kernels, shape, seq_len, tables, caches)


def _plan_and_attend(
    kernels: Kernels, shape: AttentionShape, seq_len: int, tables: torch.Tensor, caches: torch.Tensor
) -> None:
    plan = kernels.plan_attention(shape, [0, 1], [seq_len], tables)
    kernels.paged_attention(torch.randn(1, 1, 8), caches[0], caches[1], plan, 1.0)


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(("name", "formula"), [("silu_mul", silu), ("gelu_tanh_mul", gelu_tanh)])
@pytest.mark.parametrize("width", [1, 40, 4864])
def test_gated_activations(
    kernels: Kernels, name: str, formula: Callable[[torch.Tensor], torch.Tensor], width: int
) -> None:
    gate_up = torch.randn(9, 2 * width) * 4
    gate_up[0, 0], gate_up[1, 0] = 200.0, -200.0  # neither overflows
    gate, up = gate_up.double().chunk(2, dim=-1)
    op = getattr(kernels, name)
    assert_near(op(gate_up), formula(gate) * up)
    narrow = getattr(narrow_kernels(torch.bfloat16), name)
    assert_near(narrow(gate_up.bfloat16()), formula(gate) * up, 0.03)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("op", ["silu_mul", "gelu_tanh_mul", "rms_norm"])
def test_rowwise_ops_do_not_depend_on_the_number_of_rows(kernels: Kernels, op: str, num_threads: int) -> None:
    x = torch.randn(200, 2 * 4865)
    weight = torch.randn(2 * 4865)
    function = getattr(kernels, op)
    arguments = (weight, 1e-6) if op == "rms_norm" else ()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        expected = function(x, *arguments)
        for num_rows in (1, 2, 5, 14, 16, 17, 63, 100, 199):
            assert torch.equal(function(x[-num_rows:].clone(), *arguments), expected[-num_rows:]), num_rows
    finally:
        torch.set_num_threads(threads_before)


def test_softcap(kernels: Kernels) -> None:
    x = torch.randn(4, 30) * 50
    assert_near(kernels.softcap(x.clone(), 30.0), 30 * torch.tanh(x.double() / 30))


# Query tokens and KV length of each request.
MIXTURES: dict[str, list[tuple[int, int]]] = {
    "one token": [(1, 1)],
    "decodes": [(1, 200), (1, 1), (1, 128), (1, 129), (1, 17)],
    "prefill": [(300, 300)],
    "mixed": [(1, 500), (40, 40), (33, 300), (1, 3), (2, 130), (128, 256), (5, 5)],
}
# Heads, key-value heads, head size.
HEADS = [(4, 4, 16), (4, 2, 64), (14, 2, 64), (8, 1, 40), (2, 1, 256), (18, 2, 8), (3, 3, 1)]


class AttentionCase:
    """Random caches with blocks strewn about, and the float64 answer."""

    def __init__(self, mixture: list[tuple[int, int]], heads: tuple[int, int, int], window: int | None) -> None:
        self.mixture, self.window = mixture, window
        self.num_heads, self.num_kv_heads, self.head_dim = heads
        self.block_size = 16
        widest = max(-(-seq_len // self.block_size) for _, seq_len in mixture)
        num_blocks = 1 + widest * len(mixture)
        self.query = torch.randn(sum(n for n, _ in mixture), self.num_heads, self.head_dim) * 2
        # Whatever no request may read is NaN: one such value read anywhere spoils a result.
        self.caches = torch.full((2, num_blocks, self.block_size, self.num_kv_heads, self.head_dim), math.nan)
        ids = (torch.randperm(num_blocks - 1) + 1).view(len(mixture), widest)
        self.block_tables = torch.zeros(len(mixture), widest, dtype=torch.int64)
        self.slots: list[int] = []  # that are written
        for row, (num_tokens, seq_len) in enumerate(mixture):
            start = 0 if window is None else max(0, seq_len - num_tokens - window + 1)
            for position in range(start, seq_len):
                index = position // self.block_size
                self.block_tables[row, index] = ids[row, index]
                slot = self.caches[:, ids[row, index], position % self.block_size]
                slot.copy_(torch.randn_like(slot))
                self.slots.append(int(ids[row, index]) * self.block_size + position % self.block_size)

    def run(self, kernels: Kernels, rows: list[int] | None = None, **options: Any) -> torch.Tensor:
        """Attention of the requests `rows` (all by default) in one call."""
        rows = list(range(len(self.mixture))) if rows is None else rows
        starts = [0, *np.cumsum([n for n, _ in self.mixture]).tolist()]
        query = torch.cat([self.query[starts[row] : starts[row + 1]] for row in rows])
        shape = AttentionShape(self.num_heads, self.num_kv_heads, self.head_dim, self.block_size, self.window)
        query_start_loc = [0, *np.cumsum([self.mixture[row][0] for row in rows]).tolist()]
        seq_lens = [self.mixture[row][1] for row in rows]
        plan = kernels.plan_attention(shape, query_start_loc, seq_lens, self.block_tables[rows])
        return kernels.paged_attention(query, *self._stored_by(kernels), plan, **options)

    def _stored_by(self, kernels: Kernels) -> torch.Tensor:
        """The caches as `kernels` lays them out."""
        caches, slots = torch.full_like(self.caches, math.nan), torch.tensor(self.slots)
        keys, values = self.caches.flatten(1, 2)[:, slots].float()
        nothing = torch.empty(len(slots), 0)
        kernels.rotate_and_store(torch.empty_like(keys), keys, values, nothing, nothing, *caches, slots)
        return caches

    def expected(self, scale: float, softcap: float | None = None) -> torch.Tensor:
        outputs = []
        first = 0
        group = self.num_heads // self.num_kv_heads
        for row, (num_tokens, seq_len) in enumerate(self.mixture):
            for token in range(num_tokens):
                position = seq_len - num_tokens + token
                seen = range(0 if self.window is None else max(0, position - self.window + 1), position + 1)
                places = [(self.block_tables[row, p // self.block_size], p % self.block_size) for p in seen]
                blocks, offsets = torch.tensor([place[0] for place in places]), [place[1] for place in places]
                keys, values = self.caches[:, blocks, torch.tensor(offsets)].double()  # [L, K, D]
                query = self.query[first + token].double().view(self.num_kv_heads, group, -1)
                scores = torch.einsum("kgd,lkd->kgl", query, keys) * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                outputs.append(torch.einsum("kgl,lkd->kgd", scores.softmax(-1), values).flatten())
            first += num_tokens
        return torch.stack(outputs)


@pytest.mark.parametrize("window", [None, 20, 1])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mixture", list(MIXTURES))
def test_paged_attention(kernels: Kernels, mixture: str, heads: tuple[int, int, int], window: int | None) -> None:
    case = AttentionCase(MIXTURES[mixture], heads, window)
    assert_near(case.run(kernels, scale=0.3), case.expected(0.3), 5e-6)


@pytest.mark.parametrize("softcap", [5.0, 50.0])
def test_paged_attention_with_softcap(kernels: Kernels, softcap: float) -> None:
    case = AttentionCase(MIXTURES["mixed"], (4, 2, 24), 150)
    assert_near(case.run(kernels, scale=1.0, softcap=softcap), case.expected(1.0, softcap), 5e-6)


@pytest.mark.parametrize("heads", HEADS)
def test_paged_attention_of_a_request_does_not_depend_on_the_others(
    kernels: Kernels, heads: tuple[int, int, int]
) -> None:
    case = AttentionCase(MIXTURES["mixed"], heads, None)
    together = case.run(kernels, scale=0.2).split([n for n, _ in case.mixture])
    for row, output in enumerate(together):
        assert torch.equal(case.run(kernels, [row], scale=0.2), output)


def test_paged_attention_of_a_long_context(kernels: Kernels) -> None:
    """More chunks than one batch of decodes holds, and tiles in more than one batch."""
    case = AttentionCase([(1, 3000), (1, 40), (1, 5000), (70, 4000)], (2, 1, 8), None)
    assert_near(case.run(kernels, scale=0.5), case.expected(0.5), 5e-6)


def test_paged_attention_in_bfloat16() -> None:
    kernels = narrow_kernels(torch.bfloat16)
    case = AttentionCase(MIXTURES["mixed"], (4, 2, 32), None)
    expected = case.expected(0.2)
    case.query, case.caches = case.query.bfloat16(), case.caches.bfloat16()
    result = case.run(kernels, scale=0.2)
    assert result.dtype is torch.bfloat16
    assert_near(result, expected, 0.02)
