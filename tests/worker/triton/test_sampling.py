"""The device's sampler against the reference, to the bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from pelton.core.sampling_params import SamplingParams
from pelton.worker.kernels.triton import sampling
from pelton.worker.kernels.triton.device import find_device
from pelton.worker.kernels.triton.sampling import DeviceSampler
from pelton.worker.sampling.reference import ReferenceSampler
from pelton.worker.sampling.sampler import Samples
from tests.worker.test_sampler import EOS, MIXED, Case, random_case, random_logits

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several blocks, without the time that rows of a real vocabulary take here."""
    monkeypatch.setattr(sampling, "_BLOCK", 512)


DEVICE = find_device()


def sample(sampler: DeviceSampler | ReferenceSampler, logits: np.ndarray, cases: Sequence[Case]) -> Samples:
    rows = [sampler.make_row(case.params, case.seed) for case in cases]
    for row, case in zip(rows, cases, strict=True):
        row.add_prompt(case.prompt)
        row.add_output(case.outputs)
    masks = None if all(case.mask is None for case in cases) else [case.mask for case in cases]
    return sampler.sample(logits.copy(), rows, [len(case.outputs) for case in cases], masks)


def both(logits: np.ndarray, cases: Sequence[Case]) -> tuple[Samples, Samples]:
    size = logits.shape[1]
    return sample(DeviceSampler(size, {EOS}, DEVICE), logits, cases), sample(
        ReferenceSampler(size, {EOS}), logits, cases
    )


@pytest.mark.parametrize(("vocab_size", "num_batches"), [(1, 1), (63, 1), (65, 1), (600, 2)])
def test_choices_are_those_of_the_reference(vocab_size: int, num_batches: int) -> None:
    """Tokens, problems and logprobs to the bit, over settings and logits of every kind."""
    rng = np.random.default_rng(vocab_size)
    for _ in range(num_batches):
        cases = [random_case(rng, vocab_size) for _ in range(12)]
        logits = np.stack([random_logits(rng, vocab_size) for _ in cases])
        found, expected = both(logits, cases)
        assert found.problems == expected.problems
        for i, case in enumerate(cases):
            assert found.token_ids[i] == expected.token_ids[i], case
        assert found.logprobs == expected.logprobs


def test_wide_heads_are_those_of_the_reference() -> None:
    logits = np.random.default_rng(5).standard_normal((1, 1300), np.float32)
    settings = (
        SamplingParams(top_p=0.95, temperature=2.0),
        SamplingParams(top_k=500),
        SamplingParams(top_k=700, top_p=0.99, min_p=1e-4),
        SamplingParams(),
    )
    cases = [Case(params, seed=seed) for seed, params in enumerate(settings)]
    for row in (logits, np.round(logits * 2)):
        found, expected = both(np.repeat(row, len(cases), axis=0), cases)
        assert found.token_ids == expected.token_ids


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = np.random.default_rng(1).standard_normal((len(MIXED), 1003), np.float32) * np.float32(3)
    cases = [Case(params, tuple(range(20)), tuple(range(i)), seed=i) for i, params in enumerate(MIXED)]
    sampler = DeviceSampler(1003, {EOS}, DEVICE)
    alone = [sample(sampler, logits[i : i + 1], [case]) for i, case in enumerate(cases)]
    order = list(reversed(range(len(cases))))
    together = sample(sampler, logits[order], [cases[i] for i in order])
    assert together.token_ids == [alone[i].token_ids[0] for i in order]
    assert together.logprobs == {at: alone[i].logprobs[0] for at, i in enumerate(order) if alone[i].logprobs}


def test_penalties_follow_outputs_as_they_come() -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2)
    logits = np.random.default_rng(3).standard_normal((1, 50), np.float32)
    samplers = [DeviceSampler(50, {EOS}, DEVICE), ReferenceSampler(50, {EOS})]
    rows = [sampler.make_row(params, 0) for sampler in samplers]
    for row in rows:
        row.add_prompt((1, 2, 2))
    for position in range(5):
        tokens = [
            s.sample(logits.copy(), [row], [position]).token_ids[0] for s, row in zip(samplers, rows, strict=True)
        ]
        assert tokens[0] == tokens[1]
        for row in rows:
            row.add_output((tokens[0],))


def test_logits_on_the_device_stay_as_they_are() -> None:
    logits = torch.randn(3, 100, device=DEVICE)
    before = logits.clone()
    sampler = DeviceSampler(100, {EOS}, DEVICE)
    row = sampler.make_row(SamplingParams(banned_token_ids=(3,), logprobs=2), 5)
    samples = sampler.sample(logits, [row] * 3, [0, 1, 2])
    assert torch.equal(logits, before)
    assert len(samples.logprobs) == 3
    logits[1, 7] = float("nan")
    assert sampler.token_logprobs(logits, [1, 2, 3], 4) is None
    assert sampler.sample(logits, [row] * 3, [0, 1, 2]).problems[1].startswith("the model's logits are not finite")


def test_no_rows_are_no_answer() -> None:
    assert DeviceSampler(10, {EOS}, DEVICE).sample(torch.empty(0, 10), [], []) == Samples([], {}, {})
