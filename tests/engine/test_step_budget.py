from __future__ import annotations

import random
from concurrent.futures import Future

import pytest

from pelton.core.batch import ScheduledBatch, ScheduledRequest, StepResult
from pelton.core.sampling_params import SamplingParams
from pelton.engine.step_budget import MIN_CHUNK, TimeBudget
from tests.make import make_engine, make_submission


def batch(num_decodes: int, num_other_tokens: int) -> ScheduledBatch:
    counts = [1] * num_decodes + ([num_other_tokens] if num_other_tokens else [])
    sampling = SamplingParams()
    requests = [ScheduledRequest(f"r{i}", (1,) * count, 0, (), sampling, True) for i, count in enumerate(counts)]
    return ScheduledBatch(1, tuple(requests))


def time_s(num_decodes: int, num_other_tokens: int, slowness: float = 1.0) -> float:
    return slowness * (0.005 + 0.001 * num_decodes + 0.0005 * num_other_tokens)


def settle(budget: TimeBudget, rng: random.Random, num_steps: int, slowness: float = 1.0) -> list[tuple[int, float]]:
    """Steps that use all they may; the other tokens and the time of each."""
    steps = []
    for _ in range(num_steps):
        num_decodes = rng.randint(1, 20)
        num_other_tokens = budget.num_tokens(num_decodes) - num_decodes if rng.random() < 0.7 else 0
        elapsed_s = time_s(num_decodes, num_other_tokens, slowness) * rng.uniform(0.95, 1.05)
        budget.observe(batch(num_decodes, num_other_tokens), elapsed_s)
        steps.append((num_other_tokens, elapsed_s))
    return steps


@pytest.mark.parametrize("seed", range(5))
def test_steps_come_to_take_the_time_they_may(seed: int) -> None:
    budget, rng = TimeBudget(0.1, 2048), random.Random(seed)
    settle(budget, rng, 60)
    steps = settle(budget, rng, 100)
    full = [elapsed_s for num_other_tokens, elapsed_s in steps if num_other_tokens]
    assert max(elapsed_s for _, elapsed_s in steps) <= 0.1
    assert sum(full) / len(full) > 0.08


def test_it_adapts_when_steps_get_slower_and_faster() -> None:
    budget, rng = TimeBudget(0.1, 2048), random.Random(7)
    for slowness in (1.0, 3.0, 0.5):
        settle(budget, rng, 250, slowness)
        expected = (0.09 / slowness - 0.005 - 0.001 * 10) / 0.0005
        assert budget.num_tokens(10) - 10 == pytest.approx(expected, rel=0.1)


def test_prompts_go_on_however_slow_steps_are() -> None:
    budget = TimeBudget(0.001, 512)
    for _ in range(50):
        budget.observe(batch(8, MIN_CHUNK), 1.0)
    assert budget.num_tokens(8) == 8 + MIN_CHUNK


def test_nobody_decodes_nobody_is_delayed() -> None:
    assert TimeBudget(0.001, 512).num_tokens(0) == 512


def test_a_first_long_prompt_beside_decodes_is_taken_up_carefully() -> None:
    assert TimeBudget(0.1, 2048).num_tokens(4) == 4 + 2 * MIN_CHUNK


class TimedExecutor:
    """Says that steps took the time that `time_s` gives them."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, float]] = []

    def submit(self, batch: ScheduledBatch) -> Future[StepResult]:
        num_decodes = sum(1 for scheduled in batch.requests if len(scheduled.token_ids) == 1)
        elapsed_s = time_s(num_decodes, batch.num_tokens - num_decodes)
        self.steps.append((num_decodes, elapsed_s))
        future: Future[StepResult] = Future()
        sampled = tuple((1,) if scheduled.samples else () for scheduled in batch.requests)
        future.set_result(StepResult(batch.step_id, sampled, elapsed_s=elapsed_s))
        return future

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("tpot_slo_ms", "holds"), [(60.0, True), (None, False)])
def test_decodes_keep_their_pace_beside_long_prompts(tpot_slo_ms: float | None, holds: bool) -> None:
    executor = TimedExecutor()
    engine = make_engine(
        executor=executor, tpot_slo_ms=tpot_slo_ms, max_num_batched_tokens=512, num_blocks=4000, max_model_len=4000
    )
    for index in range(4):
        engine.submit(make_submission([index] * 20, max_tokens=400, ignore_eos=True))
    for index in range(6):
        engine.submit(make_submission([10 + index] * 1500, max_tokens=2))
    while engine.has_work:
        engine.dispatch()
        engine.collect()
    worst_s = max(elapsed_s for num_decodes, elapsed_s in executor.steps if num_decodes)
    assert (worst_s <= 0.07) == holds
