"""Every sampler against slow, independent references: numpy filters, exact distributions, lone rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pelton.core.sampling_params import SamplingParams
from pelton.worker.kernels.cpu import pelton_cpu
from pelton.worker.kernels.cpu.sampler import NativeSampler
from pelton.worker.sampling.draw import draw_token
from pelton.worker.sampling.logit_editor import LogitEditor
from pelton.worker.sampling.logprobs import token_logprobs
from pelton.worker.sampling.reference import ReferenceSampler
from pelton.worker.sampling.sampler import Sampler, Samples, TokenMask
from pelton.worker.sampling.selection import top_ids
from pelton.worker.sampling.uniform import uniform_at
from pelton.worker.sampling.weights import ONE, weights_of

EOS = 7


def _runs(isa: str) -> bool:
    try:
        pelton_cpu.Runtime(isa, 1, [])
    except ValueError:
        return False
    return True


NATIVE = [f"{isa} x {n}" for isa in ("avx512", "avx2", "portable") if _runs(isa) for n in (1, 3)]


@cache
def make_sampler(name: str, vocab_size: int) -> Sampler:
    if name == "reference":
        return ReferenceSampler(vocab_size, {EOS})
    isa, _, num_threads = name.partition(" x ")
    return NativeSampler(pelton_cpu.Runtime(isa, int(num_threads), []), vocab_size, {EOS})


@dataclass(frozen=True)
class Case:
    """A request about to sample."""

    params: SamplingParams
    prompt: tuple[int, ...] = (1,)
    outputs: tuple[int, ...] = ()
    seed: int = 0
    mask: TokenMask | None = None


def sample(sampler_name: str, logits: np.ndarray, cases: Sequence[Case]) -> Samples:
    sampler = make_sampler(sampler_name, logits.shape[1])
    rows = [sampler.make_row(case.params, case.seed) for case in cases]
    for row, case in zip(rows, cases, strict=True):
        row.add_prompt(case.prompt)
        row.add_output(case.outputs)
    masks = None if all(case.mask is None for case in cases) else [case.mask for case in cases]
    return sampler.sample(logits.copy(), rows, [len(case.outputs) for case in cases], masks)


every_sampler = pytest.mark.parametrize("sampler", ["reference", *NATIVE])


def randn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def reference_distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Temperature, top-k, top-p, min-p in plain float64 with a full sort. [V]"""
    scaled = logits.astype(np.float64) / params.temperature
    weights = np.exp(scaled - scaled.max())
    order = np.lexsort((np.arange(len(weights)), -weights))  # most likely first, ties by id
    kept = order[: params.top_k or len(order)]
    probabilities = weights[kept] / weights[kept].sum()
    below = np.cumsum(probabilities) - probabilities  # mass before each token
    kept = kept[below < params.top_p * (1 - 1e-12)] if params.top_p < 1 else kept
    kept = kept[weights[kept] >= params.min_p]
    result = np.zeros(len(weights))
    result[kept] = weights[kept] / weights[kept].sum()
    return result


def chi_square_limit(degrees: int) -> float:
    """Upper 1e-6 quantile, by Wilson and Hilferty's cube (1931)."""
    part = 2 / (9 * degrees)
    return degrees * (1 - part + 4.753 * math.sqrt(part)) ** 3


FILTERS = [
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.8),
    SamplingParams(top_k=1),
    SamplingParams(top_k=5),
    SamplingParams(top_p=0.5),
    SamplingParams(top_p=0.95, temperature=1.3),
    SamplingParams(min_p=0.1),
    SamplingParams(top_k=8, top_p=0.8),
    SamplingParams(top_k=12, top_p=0.9, min_p=0.15, temperature=1.2),
    SamplingParams(top_p=0.9, min_p=0.2),
    SamplingParams(top_k=10_000),
]


@pytest.mark.parametrize("params", FILTERS, ids=str)
@pytest.mark.parametrize("vocab_size", [20, 130])
def test_draws_follow_the_distribution(params: SamplingParams, vocab_size: int) -> None:
    logits = randn(vocab_size, seed=vocab_size) * np.float32(1.5)
    expected = reference_distribution(logits, params)
    num_draws = 6000
    top = float(logits.max())
    draws = [draw_token(logits, top, params, uniform_at(11, position)) for position in range(num_draws)]
    observed = np.bincount(draws, minlength=vocab_size)
    assert not observed[expected == 0].any(), "drew a token that the filters leave out"
    # Cells of fewer than 5 expected draws are pooled.
    common = expected * num_draws >= 5
    cells = [(observed[i], expected[i] * num_draws) for i in np.flatnonzero(common)]
    if expected[~common].sum() * num_draws >= 5:
        cells.append((observed[~common].sum(), expected[~common].sum() * num_draws))
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    assert len(cells) == 1 or statistic < chi_square_limit(len(cells) - 1)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab_size=st.one_of(st.integers(1, 400), st.sampled_from([8256, 20_001])),
    spread=st.sampled_from([0.01, 1.0, 6.0]),
    params=st.builds(
        SamplingParams,
        top_k=st.sampled_from([0, 1, 2, 7, 40, 500]),
        top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
        min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
        temperature=st.sampled_from([0.01, 0.7, 1.0, 3.0]),
    ),
)
def test_the_draw_inverts_the_reference_cdf(seed: int, vocab_size: int, spread: float, params: SamplingParams) -> None:
    """The token drawn for u is the one whose interval of the reference's CDF holds u."""
    logits = randn(vocab_size, seed=seed) * np.float32(spread)
    expected = reference_distribution(logits, params)
    # Where float32 could put a token on the other side of a filter's edge, there is nothing to compare.
    for nudge in (1 - 1e-4, 1 + 1e-4):
        nudged = replace(params, top_p=min(1.0, params.top_p * nudge), min_p=min(1.0, params.min_p * nudge))
        kept = reference_distribution(logits, nudged) > 0
        assume(params.min_p == 1.0 or (kept == (expected > 0)).all())
    ends = np.cumsum(expected)
    for uniform in (0.0, 0.1, 0.25, 0.5, 0.77, 0.99, 1 - 2**-53):
        token_id = draw_token(logits, float(logits.max()), params, uniform)
        assert expected[token_id] > 0
        assert ends[token_id] - expected[token_id] - 1e-4 <= uniform <= ends[token_id] + 1e-4


def test_weights_are_exponentials() -> None:
    logits = np.linspace(-60, 5, 40_001).astype(np.float32)
    for temperature in (0.5, 1.0, 3.0):
        weights = weights_of(logits, 5.0, temperature)
        exact = np.exp((logits.astype(np.float64) - 5.0) / temperature) * ONE
        np.testing.assert_allclose(weights, exact, rtol=3e-6, atol=1.0)
        assert weights[-1] == ONE
    assert weights_of(np.array([-math.inf, -3.4e38, 3.4e38], np.float32), 3.4e38, 1.0).tolist() == [0, 0, ONE]


def test_top_ids_match_a_stable_sort_with_many_ties() -> None:
    rng = np.random.default_rng(0)
    for vocab_size in (1, 63, 64, 65, 1000, 5000):
        row = rng.integers(0, 40, vocab_size).astype(np.float32)
        row[rng.random(vocab_size) < 0.3] = -math.inf
        order = sorted(range(vocab_size), key=lambda i: (-row[i], i))
        finite = [i for i in order if row[i] > -math.inf]
        for count in (1, 2, 20, 37, 500, vocab_size):
            found = [i for i in top_ids(row, count).tolist() if row[i] > -math.inf]
            assert found == finite[:count]


def test_uniform_numbers_are_uniform_and_independent_of_neighbours() -> None:
    numbers = np.array([[uniform_at(seed, position) for position in range(200)] for seed in range(200)])
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < chi_square_limit(99)
    for other in (numbers[1:, :], numbers[:, 1:], numbers[1:, 1:], numbers[:-1, 1:]):
        first = numbers[: other.shape[0], : other.shape[1]] if other is not numbers[:-1, 1:] else numbers[1:, :-1]
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.03
    assert uniform_at(-1, 3) == uniform_at(2**64 - 1, 3)
    # Seeds apart by SplitMix64's increment would share one stream, a position apart.
    assert uniform_at(5, 1) != uniform_at(5 + 0x9E3779B97F4A7C15, 0)


MIXED = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, logprobs=5),
    SamplingParams(),
    SamplingParams(logprobs=3),
    SamplingParams(temperature=0.8, top_k=40),
    SamplingParams(temperature=0.8, top_p=0.9, logprobs=0),
    SamplingParams(min_p=0.05),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5),
    SamplingParams(top_p=0.95, frequency_penalty=1.0, logprobs=2),
    SamplingParams(logit_bias={3: 5.0, 900: -100.0}, banned_token_ids=(5,)),
    SamplingParams(allowed_token_ids=(4, 8, 1000), logprobs=4),
    SamplingParams(min_tokens=5, stop_token_ids=(9,)),
]


@every_sampler
@pytest.mark.parametrize("vocab_size", [1003, 40_001])
def test_a_row_does_not_depend_on_its_batch(sampler: str, vocab_size: int) -> None:
    """Token, logprob bits and top list, alone and at every place of a mixed batch (law 3)."""
    logits = randn(len(MIXED), vocab_size, seed=1) * np.float32(3)
    tokens = tuple(np.random.default_rng(2).integers(0, 1000, 30).tolist())
    cases = [Case(params, tokens[:20], tokens[20 : 20 + i], seed=i) for i, params in enumerate(MIXED)]
    alone = [sample(sampler, logits[i : i + 1], [case]) for i, case in enumerate(cases)]
    for shift in range(len(MIXED)):
        order = [(i + shift) % len(MIXED) for i in range(len(MIXED))][: len(MIXED) - shift // 2]
        together = sample(sampler, logits[order], [cases[i] for i in order])
        assert together.token_ids == [alone[i].token_ids[0] for i in order]
        assert together.logprobs == {at: alone[i].logprobs[0] for at, i in enumerate(order) if alone[i].logprobs}


def random_logits(rng: np.random.Generator, vocab_size: int) -> np.ndarray:
    """As peaked, as flat, as full of ties and as extreme as a model may make them."""
    row = rng.standard_normal(vocab_size).astype(np.float32)
    match rng.integers(7):
        case 0:
            row *= np.float32(rng.uniform(0.01, 8))
        case 1:
            row[rng.integers(0, vocab_size, 5)] += np.float32(rng.uniform(3, 20))
        case 2:
            row = np.round(row * 2)
        case 3:
            row = np.full_like(row, rng.choice([0.0, -0.0, -7.5, 1e30]))
            row[rng.integers(0, vocab_size, 3)] = rng.choice([0.0, -0.0, -7.5])
        case 4:
            row[rng.random(vocab_size) < 0.7] = -math.inf
            row[rng.integers(vocab_size)] = 1.0
        case 5:
            row *= np.float32(1e37)
        case 6:
            row *= np.float32(1e-39)
    return row


def random_case(rng: np.random.Generator, vocab_size: int) -> Case:
    def maybe(value: object, otherwise: object) -> Any:
        return value if rng.random() < 0.3 else otherwise

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocab_size + 3, count).tolist())

    params = SamplingParams(
        temperature=float(rng.choice([0.0, 0.01, 0.7, 1.0, 2.5, 1e-35])),
        top_k=int(rng.choice([0, 0, 1, 3, 40, 600, 10**6])),
        top_p=float(rng.choice([1.0, 1.0, 0.999, 0.9, 0.5, 1e-9])),
        min_p=float(rng.choice([0.0, 0.0, 1e-15, 0.02, 0.5, 1.0])),
        repetition_penalty=maybe(float(rng.uniform(0.5, 2.0)), 1.0),
        presence_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        frequency_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        logit_bias=maybe({i: float(rng.uniform(-100, 100)) for i in ids(4)}, {}),
        allowed_token_ids=maybe(ids(int(rng.integers(1, 200))), None),
        banned_token_ids=maybe(ids(5), ()),
        min_tokens=int(rng.integers(0, 30)),
        stop_token_ids=maybe(ids(2), ()),
        ignore_eos=bool(rng.random() < 0.5),
        logprobs=maybe(int(rng.integers(0, 21)), None),
    )
    mask = rng.integers(0, 2**32, -(-vocab_size // 32), np.uint32) if rng.random() < 0.3 else None
    if mask is not None and rng.random() < 0.5:  # a grammar alone
        params = SamplingParams(temperature=params.temperature, top_p=params.top_p, logprobs=params.logprobs)
    prompt, outputs = rng.integers(0, vocab_size, 20).tolist(), rng.integers(0, vocab_size, rng.integers(30)).tolist()
    return Case(params, tuple(prompt), tuple(outputs), int(rng.integers(2**63)), mask)


@pytest.mark.parametrize("sampler", NATIVE)
@pytest.mark.parametrize(
    ("vocab_size", "num_batches"), [(1, 5), (63, 40), (64, 40), (65, 40), (1000, 60), (5003, 40), (151_936, 3)]
)
def test_native_samplers_choose_as_the_reference_does(sampler: str, vocab_size: int, num_batches: int) -> None:
    """Tokens, problems and logprobs to the bit, over settings and logits of every kind."""
    rng = np.random.default_rng(vocab_size)
    for _ in range(num_batches):
        cases = [random_case(rng, vocab_size) for _ in range(12)]
        logits = np.stack([random_logits(rng, vocab_size) for _ in cases])
        found, expected = sample(sampler, logits, cases), sample("reference", logits, cases)
        assert found.problems == expected.problems
        for i, case in enumerate(cases):
            assert found.token_ids[i] == expected.token_ids[i], case
        assert found.logprobs == expected.logprobs


@pytest.mark.parametrize("sampler", NATIVE[:1])
def test_wide_heads_are_those_of_the_reference(sampler: str) -> None:
    """Settings that keep tens of thousands of tokens, whose order is never made in full."""
    logits = randn(1, 60_000, seed=5)
    for params in (
        SamplingParams(top_p=0.95, temperature=2.0),
        SamplingParams(top_k=20_000),
        SamplingParams(top_k=30_000, top_p=0.99, min_p=1e-4),
        SamplingParams(min_p=1e-6),
    ):
        cases = [Case(params, seed=seed) for seed in range(20)]
        rows = np.repeat(logits, len(cases), axis=0)
        assert sample(sampler, rows, cases).token_ids == sample("reference", rows, cases).token_ids
        ties = np.round(rows)
        assert sample(sampler, ties, cases).token_ids == sample("reference", ties, cases).token_ids


@every_sampler
def test_the_seed_and_the_position_decide_the_draw(sampler: str) -> None:
    def draws(seed: int) -> list[int]:
        cases = [Case(SamplingParams(), outputs=(1,) * position, seed=seed) for position in range(20)]
        return sample(sampler, np.zeros((20, 5000), np.float32), cases).token_ids

    assert draws(5) == draws(5)
    assert draws(5) != draws(6)
    assert len(set(draws(5))) > 15
    assert draws(-1) == draws(2**64 - 1)


@every_sampler
def test_greedy_ties_go_to_the_lowest_id(sampler: str) -> None:
    logits = np.zeros((4, 300), np.float32)
    logits[1, [70, 200]] = 2.0
    logits[2, [299]] = 1.0
    logits[3, :] = -1.0
    logits[3, [5, 9]] = -0.0, 0.0
    assert sample(sampler, logits, [Case(SamplingParams(temperature=0.0))] * 4).token_ids == [0, 70, 299, 5]


@every_sampler
@pytest.mark.parametrize("vocab_size", [5, 64, 100])
def test_a_mask_leaves_what_a_grammar_allows(sampler: str, vocab_size: int) -> None:
    logits = np.arange(vocab_size, dtype=np.float32)[None].repeat(4, axis=0)
    masks = np.zeros((3, -(-vocab_size // 32)), np.uint32)
    masks[0, 0] = 0b10100
    masks[1] = 2**32 - 1
    greedy = SamplingParams(temperature=0.0, logprobs=1)
    cases = [Case(greedy, mask=mask) for mask in masks] + [Case(greedy)]
    found = sample(sampler, logits, cases)
    assert found.token_ids == [4, vocab_size - 1, -1, vocab_size - 1]
    assert "ban all" in found.problems[2]
    assert found.logprobs[0].rank == vocab_size - 4  # of the raw logits
    # Bias does not bring back what the grammar forbids, and both lists must allow a token.
    both = SamplingParams(temperature=0.0, logit_bias={3: 100.0}, allowed_token_ids=(2, 3))
    assert sample(sampler, logits[:1], [Case(both, mask=masks[0])]).token_ids == [2]


def edited(
    params: SamplingParams, row: list[float], prompt: tuple[int, ...] = (), outputs: tuple[int, ...] = ()
) -> list:
    editor = LogitEditor(params, {EOS}, len(row))
    editor.add_prompt(prompt)
    editor.add_output(outputs)
    array = np.array(row, dtype=np.float32)
    editor.apply(array, len(outputs))
    return [round(value, 4) for value in array.tolist()]


INF = math.inf
ROW = [2.0, -2.0, 1.0, 0.5, 3.0, 0.0, -1.0, 4.0]  # id 7 is end of sequence


@pytest.mark.parametrize(
    ("params", "outputs", "changed"),
    [
        ({"logit_bias": {0: 1.5, 6: -3.0}}, (), {0: 3.5, 6: -4.0}),
        ({"logit_bias": {99: 5.0, -1: 5.0, 1: 1.0}}, (), {1: -1.0}),
        ({"banned_token_ids": (2, 4, 99)}, (), {2: -INF, 4: -INF}),
        ({"allowed_token_ids": (1, 4, 99)}, (), dict.fromkeys((0, 2, 3, 5, 6, 7), -INF)),
        ({"allowed_token_ids": (1, 4), "banned_token_ids": (4,)}, (), dict.fromkeys((0, 2, 3, 4, 5, 6, 7), -INF)),
        ({"min_tokens": 2}, (3,), {7: -INF}),
        ({"min_tokens": 2}, (3, 3), {}),
        ({"min_tokens": 2, "stop_token_ids": (2,)}, (), {2: -INF, 7: -INF}),
        ({"min_tokens": 2, "stop_token_ids": (2,), "ignore_eos": True}, (), {2: -INF}),
        # The prompt is (0, 1): repetition sees it, presence and frequency do not.
        ({"repetition_penalty": 2.0}, (4,), {0: 1.0, 1: -4.0, 4: 1.5}),
        ({"presence_penalty": 1.0}, (4, 4, 0), {0: 1.0, 4: 2.0}),
        ({"frequency_penalty": 0.5}, (4, 4, 0), {0: 1.5, 4: 2.0}),
        ({"frequency_penalty": -0.5, "presence_penalty": -1.0}, (4, 4), {4: 5.0}),
        ({"repetition_penalty": 2.0, "frequency_penalty": 1.0}, (4, 4), {0: 1.0, 1: -4.0, 4: -0.5}),
    ],
    ids=str,
)
def test_edits(params: dict, outputs: tuple[int, ...], changed: dict[int, float]) -> None:
    expected = [changed.get(i, value) for i, value in enumerate(ROW)]
    assert edited(SamplingParams(**params), ROW, (0, 1), outputs) == expected


def test_penalties_follow_outputs_as_they_come() -> None:
    """Adding tokens one by one equals starting from all of them (resume after preemption)."""
    outputs = tuple(np.random.default_rng(3).integers(0, 2000, 1500).tolist())
    params = SamplingParams(repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.1)
    row = randn(2000, seed=4)
    editors = [LogitEditor(params, {EOS}, 2000) for _ in range(2)]
    for editor in editors:
        editor.add_prompt((1, 2))
    for token_id in outputs:
        editors[0].add_output((token_id,))
    editors[1].add_output(outputs)
    rows = row.copy(), row.copy()
    for editor, target in zip(editors, rows, strict=True):
        editor.apply(target, len(outputs))
    assert np.array_equal(*rows)
    counts = np.bincount(outputs, minlength=2000)
    expected = row.astype(np.float64)
    seen = counts > 0
    seen[[1, 2]] = True
    expected = np.where(seen, np.where(expected > 0, expected / 1.2, expected * 1.2), expected)
    expected -= 0.3 * counts + 0.1 * (counts > 0)
    np.testing.assert_allclose(rows[0], expected, rtol=1e-5, atol=1e-5)


@every_sampler
@pytest.mark.parametrize(("vocab_size", "num_top"), [(30, 5), (30, 0), (30, 30), (20_000, 20)])
def test_logprobs_match_log_softmax(sampler: str, vocab_size: int, num_top: int) -> None:
    row = randn(vocab_size, seed=2) * np.float32(4)
    row[3] = row[9]  # a tie
    wide = row.astype(np.float64)
    expected = wide - wide.max() - math.log(np.exp(wide - wide.max()).sum())
    order = sorted(range(vocab_size), key=lambda i: (-row[i], i))
    token_ids = (0, 3, 9, order[0], order[-1])
    logits = row[None].repeat(len(token_ids), axis=0)
    answers = make_sampler(sampler, vocab_size).token_logprobs(logits, token_ids, num_top)
    assert answers is not None
    for token_id, found in zip(token_ids, answers, strict=True):
        assert found.token_id == token_id
        assert found.logprob == pytest.approx(expected[token_id], abs=1e-6)
        assert found.rank == order.index(token_id) + 1
        assert [i for i, _ in found.top] == order[:num_top]
        assert [value for _, value in found.top] == pytest.approx(expected[order[:num_top]].tolist(), abs=1e-6)


@every_sampler
def test_logprobs_of_broken_logits_are_none(sampler: str) -> None:
    for bad in (math.nan, math.inf):
        logits = randn(3, 100)
        logits[1, 70] = bad
        assert make_sampler(sampler, 100).token_logprobs(logits, (1, 2, 3), 2) is None


@every_sampler
def test_reported_logprobs_are_of_the_raw_logits(sampler: str) -> None:
    row = np.array([1.0, 2.0, 3.0, 0.0], np.float32)
    params = SamplingParams(temperature=0.0, logprobs=4, banned_token_ids=(2,), logit_bias={0: 50.0})
    answer = sample(sampler, row[None], [Case(params)])
    assert answer.token_ids == [0]
    assert answer.logprobs == {0: token_logprobs(row, 0, 4)}
    assert answer.logprobs[0].rank == 3


@every_sampler
@pytest.mark.parametrize(
    ("bad", "params", "words"),
    [
        ([math.nan], SamplingParams(temperature=0.0), "not finite"),
        ([math.nan], SamplingParams(top_k=3, logprobs=2), "not finite"),
        ([math.inf], SamplingParams(), "not finite"),
        ([-math.inf] * 50, SamplingParams(), "not finite"),
        ([], SamplingParams(allowed_token_ids=(3, 4), banned_token_ids=(3, 4)), "ban all"),
        ([], SamplingParams(allowed_token_ids=(50, 999)), "ban all"),
        ([], SamplingParams(temperature=0.0, allowed_token_ids=(EOS,), min_tokens=1), "ban all"),
        ([3e38], SamplingParams(logit_bias={0: 100.0}, repetition_penalty=0.01), "overflow"),
    ],
    ids=str,
)
def test_one_bad_row_fails_alone(sampler: str, bad: list[float], params: SamplingParams, words: str) -> None:
    logits = randn(3, 50)
    logits[1, : len(bad)] = bad
    good = SamplingParams(temperature=0.0)
    answers = sample(sampler, logits, [Case(p, prompt=(0,)) for p in (good, params, good)])
    assert list(answers.problems) == [1]
    assert words in answers.problems[1]
    assert answers.token_ids == [int(logits[0].argmax()), -1, int(logits[2].argmax())]
    assert 1 not in answers.logprobs


@every_sampler
@pytest.mark.parametrize("vocab_size", [1, 63, 64, 130])
def test_a_nan_is_found_anywhere(sampler: str, vocab_size: int) -> None:
    logits = np.zeros((vocab_size, vocab_size), np.float32)
    np.fill_diagonal(logits, math.nan)
    logits[::2] *= -1
    found = sample(sampler, logits, [Case(SamplingParams(temperature=0.0))] * vocab_size)
    assert len(found.problems) == vocab_size


@every_sampler
@pytest.mark.parametrize(
    "params",
    [SamplingParams(temperature=1e-45), SamplingParams(temperature=1e-6, top_k=3), SamplingParams(top_p=1e-9)],
    ids=str,
)
def test_extreme_settings_are_greedy(sampler: str, params: SamplingParams) -> None:
    row = np.array([[0.0, 1e-3, -5.0, 1e4, 2.0]], np.float32)
    assert sample(sampler, row, [Case(params)]).token_ids == [3]


@every_sampler
def test_infinitely_unlikely_tokens_are_never_drawn(sampler: str) -> None:
    logits = np.full((40, 200), -math.inf, np.float32)
    logits[:, [5, 150]] = 0.0
    for params in (SamplingParams(), SamplingParams(top_k=50), SamplingParams(top_p=0.99), SamplingParams(min_p=0.1)):
        drawn = sample(sampler, logits, [Case(params, seed=seed) for seed in range(40)]).token_ids
        assert set(drawn) == {5, 150}


@pytest.mark.parametrize("sampler", NATIVE[:1])
def test_native_samplers_refuse_what_does_not_fit(sampler: str) -> None:
    """Shapes are checked where Python ends: beyond it are addresses."""
    native, other = make_sampler(sampler, 100), make_sampler(sampler, 64)
    row, foreign = native.make_row(SamplingParams(), 1), other.make_row(SamplingParams(), 1)
    logits = np.zeros((2, 100), np.float32)
    with pytest.raises(ValueError, match="wanted"):
        native.sample(logits, [row], [0])
    with pytest.raises(ValueError, match="wanted"):
        other.sample(logits, [foreign, foreign], [0, 0])
    with pytest.raises(ValueError, match="number"):
        native.sample(logits, [row, row], [0])
    with pytest.raises(ValueError, match="vocabulary"):
        native.sample(logits, [row, foreign], [0, 0])
    with pytest.raises(ValueError, match="mask"):
        native.sample(logits, [row, row], [0, 0], [None, np.zeros(3, np.uint32)])
    with pytest.raises(IndexError, match="vocabulary"):
        native.token_logprobs(logits, [1, 100], 3)
    # Other memory layouts are copied.
    assert native.sample(np.asfortranarray(logits).astype(np.float64), [row, row], [0, 0]).problems == {}
