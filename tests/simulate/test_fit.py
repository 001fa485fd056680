import random

import pytest

from pelton.core.errors import ConfigError
from pelton.simulate.cost import StepCost, StepShape
from pelton.simulate.fit import fit_cost
from pelton.simulate.step_log import MeasuredStep

TRUE = StepCost(
    name="true",
    knots=((1, 0.02), (16, 0.03), (64, 0.07), (512, 0.4)),
    sample_s=0.001,
    decode_context_s=2e-6,
    prefill_pair_s=3e-8,
    kv_op_s={"load:host": 0.002},
)


def measured_steps(count: int, noise: float) -> list[MeasuredStep]:
    rng = random.Random(1)
    steps = []
    for _ in range(count):
        num_decodes = rng.choice([0, 1, 2, 4, 8, 16, 32])
        num_chunk = rng.choice([0, 0, 16, 64, 128, 480]) or (0 if num_decodes else 7)
        start = rng.randrange(4000)
        shape = StepShape(
            num_tokens=num_decodes + num_chunk,
            num_samples=num_decodes + rng.randrange(2),
            num_decode_positions=sum(rng.randrange(1, 4000) for _ in range(num_decodes)),
            num_prefill_pairs=num_chunk * start + num_chunk * (num_chunk + 1) // 2,
            moved_kv_tokens={"load:host": rng.randrange(4)} if rng.random() < 0.3 else {},
        )
        disturbance = 5.0 if rng.random() < 0.03 else 1.0
        steps.append(MeasuredStep(shape, TRUE.step_s(shape) * rng.gauss(1, noise) * disturbance))
    return steps


def test_the_fit_finds_what_made_the_steps() -> None:
    cost, error = fit_cost(measured_steps(2000, noise=0.02), "fit", 1000, 100, "test")
    assert error.median < 0.03
    assert cost.decode_context_s == pytest.approx(TRUE.decode_context_s, rel=0.1)
    assert cost.prefill_pair_s == pytest.approx(TRUE.prefill_pair_s, rel=0.15)
    assert cost.kv_op_s["load:host"] == pytest.approx(0.002, rel=0.15)
    for shape in (StepShape(1, 1, 500, 0), StepShape(256, 1, 0, 256 * 1000), StepShape(512, 33, 40_000, 480 * 2000)):
        assert cost.step_s(shape) == pytest.approx(TRUE.step_s(shape), rel=0.05)


def test_too_few_steps_are_no_fit() -> None:
    with pytest.raises(ConfigError, match="49 steps are too few"):
        fit_cost(measured_steps(49, noise=0.0), "fit", 1000, 100, "test")


def test_steps_of_one_kind_are_enough() -> None:
    steps = [MeasuredStep(StepShape(1, 1, 10 + n, 0), 0.02) for n in range(100)]
    cost, error = fit_cost(steps, "fit", 1000, 100, "test")
    assert cost.step_s(StepShape(1, 1, 50, 0)) == pytest.approx(0.02, rel=0.02)
    assert error.p90 < 0.02
