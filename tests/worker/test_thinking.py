"""Reasoning that is held to a budget: which tokens are forced, and that they are the ones sampled."""

from __future__ import annotations

import numpy as np
import pytest

from pelton.core.batch import RequestContext
from pelton.core.sampling_params import SamplingParams
from pelton.core.thinking import ThinkingBudget
from pelton.worker.model_runner import with_forced_tokens
from pelton.worker.request_state import RequestState
from pelton.worker.sampling.reference import ReferenceSampler
from pelton.worker.sampling.thinking import ThinkingLimit

START, END = (40, 41), (42, 43)
OPEN = ThinkingBudget(max_tokens=3, end_token_ids=END, forced_token_ids=(10, *END))
MARKED = ThinkingBudget(max_tokens=2, end_token_ids=END, forced_token_ids=END, start_token_ids=START)
VOCAB_SIZE = 50


def written(budget: ThinkingBudget, wanted: list[int]) -> list[int]:
    """What comes of a model that would write `wanted`."""
    limit, outputs, rest = ThinkingLimit(budget), [], list(wanted)
    while rest:
        forced = limit.forced_token_id()
        token_id = rest.pop(0) if forced is None else forced
        limit.add_output((token_id,))
        outputs.append(token_id)
    return outputs


@pytest.mark.parametrize(
    ("budget", "wanted", "outputs"),
    [
        (OPEN, [1, 2, 3, 4, 5], [1, 2, 3, 10, 42, 43, 4, 5]),
        (OPEN, [1, 42, 43, 4, 5, 6, 7], [1, 42, 43, 4, 5, 6, 7]),  # it ended by itself
        (MARKED, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),  # it never began
        (MARKED, [40, 41, 1, 2, 3], [40, 41, 1, 2, 42, 43, 3]),
        (MARKED, [9, 40, 41, 1, 42, 5, 6], [9, 40, 41, 1, 42, 43, 5, 6]),  # it had begun to end
        (ThinkingBudget(max_tokens=0, end_token_ids=END, forced_token_ids=END), [1, 2], [42, 43, 1, 2]),
    ],
)
def test_reasoning_ends_once_its_budget_is_spent(budget: ThinkingBudget, wanted: list[int], outputs: list[int]) -> None:
    assert written(budget, wanted) == outputs


def test_a_preempted_request_goes_on_where_it_was() -> None:
    outputs = written(OPEN, [1, 2, 3, 4])
    for cut in range(len(outputs)):
        limit = ThinkingLimit(OPEN)
        limit.add_output(outputs[:cut])
        assert limit.forced_token_id() in (None, outputs[cut])
        assert (limit.forced_token_id() is not None) == (3 <= cut < 6)


def test_the_forced_token_is_sampled_whatever_the_logits_say() -> None:
    sampler = ReferenceSampler(VOCAB_SIZE, {0})
    sampling = SamplingParams(temperature=0.0, thinking=OPEN, logprobs=0)
    states = [
        RequestState(RequestContext((5,), (1, 2, 3), seed=1), sampling, sampler),
        RequestState(RequestContext((5,), (1, 2), seed=1), sampling, sampler),
    ]
    logits = np.zeros((2, VOCAB_SIZE), dtype=np.float32)
    logits[:, 7] = 9.0
    masks = with_forced_tokens(None, states, VOCAB_SIZE)
    samples = sampler.sample(logits, [state.sampling_row for state in states], [3, 2], masks)
    assert samples.token_ids == [10, 7]
    assert samples.logprobs[0].token_id == 10
    assert with_forced_tokens(None, states[1:], VOCAB_SIZE) is None
