"""The sampler against slow, independent references: numpy filters, exact distributions, lone rows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pelton.core.batch import RequestContext
from pelton.core.sampling_params import SamplingParams
from pelton.worker.request_state import RequestState
from pelton.worker.sampling.draw import draw_token
from pelton.worker.sampling.logit_editor import LogitEditor
from pelton.worker.sampling.logprobs import token_logprobs
from pelton.worker.sampling.sampler import Sample, sample
from pelton.worker.sampling.selection import top_ids
from pelton.worker.sampling.uniform import uniform_at

pytestmark = pytest.mark.torch

EOS = 7
Ids = tuple[int, ...]


def make_state(
    sampling: SamplingParams,
    vocab_size: int,
    prompt: tuple[int, ...] = (1,),
    outputs: tuple[int, ...] = (),
    seed: int = 0,
) -> RequestState:
    editor = None
    if LogitEditor.is_needed(sampling):
        editor = LogitEditor(sampling, {EOS}, vocab_size)
        editor.add_prompt(prompt)
        editor.add_output(outputs)
    return RequestState(RequestContext(prompt, outputs, seed), sampling, editor)


def sample_one(row: torch.Tensor, state: RequestState) -> Sample:
    return sample(row.clone().unsqueeze(0).numpy(), [state])[0]


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
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 1.5
    expected = reference_distribution(logits.numpy(), params)
    num_draws = 6000
    top = logits.max().item()
    draws = [draw_token(logits.numpy(), top, params, uniform_at(11, position)) for position in range(num_draws)]
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
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * spread
    expected = reference_distribution(logits.numpy(), params)
    # Where float32 could put a token on the other side of a filter's edge, there is nothing to compare.
    for nudge in (1 - 1e-4, 1 + 1e-4):
        nudged = replace(params, top_p=min(1.0, params.top_p * nudge), min_p=min(1.0, params.min_p * nudge))
        kept = reference_distribution(logits.numpy(), nudged) > 0
        assume(params.min_p == 1.0 or (kept == (expected > 0)).all())
    ids = np.arange(vocab_size)
    if 0 < params.top_k < vocab_size or params.top_p < 1.0:
        order = np.lexsort((ids, -logits.numpy()))
    else:  # by id after min-p, else by column of a matrix of 64 rows
        order = ids if params.min_p > 0 else np.lexsort((ids, ids % -(-vocab_size // 64)))
    ends = np.cumsum(expected[order])
    place = {int(token_id): i for i, token_id in enumerate(order)}
    for uniform in (0.0, 0.1, 0.25, 0.5, 0.77, 0.99, 1 - 2**-53):
        token_id = draw_token(logits.numpy(), logits.max().item(), params, uniform)
        assert expected[token_id] > 0
        end = ends[place[token_id]]
        assert end - expected[token_id] - 1e-4 <= uniform <= end + 1e-4


def test_top_ids_match_a_stable_sort_with_many_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    for vocab_size in (1, 63, 64, 65, 1000, 5000):
        row = torch.randint(0, 40, (vocab_size,), generator=generator).float()
        row[torch.rand(vocab_size, generator=generator) < 0.3] = -math.inf
        order = sorted(range(vocab_size), key=lambda i: (-row[i].item(), i))
        finite = [i for i in order if row[i] > -math.inf]
        for count in (1, 2, 20, 37, 500, vocab_size):
            found = [i for i in top_ids(row.numpy(), count).tolist() if row[i] > -math.inf]
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


@pytest.mark.parametrize("vocab_size", [1003, 40_001])
def test_a_row_does_not_depend_on_its_batch(vocab_size: int) -> None:
    """Token, logprob bits and top list, alone and at every place of a mixed batch (law 3)."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(len(MIXED), vocab_size, generator=generator) * 3
    tokens = tuple(torch.randint(0, 1000, (30,), generator=generator).tolist())

    def states() -> list[RequestState]:
        return [make_state(p, vocab_size, tokens[:20], tokens[20 : 20 + i], seed=i) for i, p in enumerate(MIXED)]

    alone = [sample_one(logits[i], state) for i, state in enumerate(states())]
    for shift in range(len(MIXED)):
        order = [(i + shift) % len(MIXED) for i in range(len(MIXED))][: len(MIXED) - shift // 2]
        fresh = states()
        together = sample(logits[order].numpy(), [fresh[i] for i in order])
        assert together == [alone[i] for i in order]


def test_the_seed_and_the_position_decide_the_draw() -> None:
    logits = torch.zeros(5000)
    params = SamplingParams()
    first = [sample_one(logits, make_state(params, 5000, outputs=(1,) * n, seed=5)).token_id for n in range(20)]
    again = [sample_one(logits, make_state(params, 5000, outputs=(1,) * n, seed=5)).token_id for n in range(20)]
    other = [sample_one(logits, make_state(params, 5000, outputs=(1,) * n, seed=6)).token_id for n in range(20)]
    assert first == again
    assert first != other
    assert len(set(first)) > 15


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(3, 300)
    logits[1, [70, 200]] = 2.0
    logits[2, [299]] = 1.0
    greedy = make_state(SamplingParams(temperature=0.0), 300)
    assert [answer.token_id for answer in sample(logits.numpy(), [greedy] * 3)] == [0, 70, 299]


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
    generator = torch.Generator().manual_seed(3)
    outputs = tuple(torch.randint(0, 2000, (1500,), generator=generator).tolist())
    params = SamplingParams(repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.1)
    row = torch.randn(2000, generator=generator).numpy()
    grown = make_state(params, 2000, (1, 2))
    for token_id in outputs:
        grown.add_output(token_id)
    whole = make_state(params, 2000, (1, 2), outputs)
    rows = row.copy(), row.copy()
    for state, target in zip((grown, whole), rows, strict=True):
        assert state.editor is not None
        state.editor.apply(target, len(outputs))
    assert np.array_equal(*rows)
    counts = np.bincount(outputs, minlength=2000)
    expected = row.astype(np.float64)
    seen = counts > 0
    seen[[1, 2]] = True
    expected = np.where(seen, np.where(expected > 0, expected / 1.2, expected * 1.2), expected)
    expected -= 0.3 * counts + 0.1 * (counts > 0)
    np.testing.assert_allclose(rows[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("vocab_size", "num_top"), [(30, 5), (30, 0), (30, 30), (20_000, 20)])
def test_logprobs_match_log_softmax(vocab_size: int, num_top: int) -> None:
    row = torch.randn(vocab_size, generator=torch.Generator().manual_seed(2)) * 4
    row[3] = row[9]  # a tie
    expected = torch.log_softmax(row.double(), dim=0)
    order = sorted(range(vocab_size), key=lambda i: (-row[i].item(), i))
    for token_id in (0, 3, 9, order[0], order[-1]):
        found = token_logprobs(row.numpy(), token_id, num_top)
        assert found.token_id == token_id
        assert found.logprob == pytest.approx(expected[token_id].item(), abs=1e-5)
        assert found.rank == order.index(token_id) + 1
        assert [i for i, _ in found.top] == order[:num_top]
        assert [value for _, value in found.top] == pytest.approx(expected[order[:num_top]].tolist(), abs=1e-5)


def test_reported_logprobs_are_of_the_raw_logits() -> None:
    row = torch.tensor([1.0, 2.0, 3.0, 0.0])
    params = SamplingParams(temperature=0.0, logprobs=4, banned_token_ids=(2,), logit_bias={0: 50.0})
    answer = sample_one(row, make_state(params, 4))
    assert answer.token_id == 0
    assert answer.logprobs == token_logprobs(row.numpy(), 0, 4)
    assert answer.logprobs.rank == 3


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
def test_one_bad_row_fails_alone(bad: list[float], params: SamplingParams, words: str) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    logits[1, : len(bad)] = torch.tensor(bad)
    good = SamplingParams(temperature=0.0)
    prompt = (0,)
    answers = sample(logits.clone().numpy(), [make_state(p, 50, prompt) for p in (good, params, good)])
    assert words in (answers[1].problem or "")
    assert [answers[i].token_id for i in (0, 2)] == [int(logits[i].argmax()) for i in (0, 2)]


@pytest.mark.parametrize(
    "params",
    [SamplingParams(temperature=1e-45), SamplingParams(temperature=1e-6, top_k=3), SamplingParams(top_p=1e-9)],
    ids=str,
)
def test_extreme_settings_are_greedy(params: SamplingParams) -> None:
    row = torch.tensor([0.0, 1e-3, -5.0, 1e4, 2.0])
    assert sample_one(row, make_state(params, 5)).token_id == 3


def test_infinitely_unlikely_tokens_are_never_drawn() -> None:
    row = torch.full((200,), -math.inf)
    row[[5, 150]] = 0.0
    for params in (SamplingParams(), SamplingParams(top_k=50), SamplingParams(top_p=0.99), SamplingParams(min_p=0.1)):
        drawn = {draw_token(row.numpy(), 0.0, params, uniform) for uniform in (0.0, 0.4999, 0.5, 1 - 2**-53)}
        assert drawn == {5, 150}
