from dataclasses import replace
from pathlib import Path

import pytest

from pelton.core.batch import KVOp, KVOpKind, ScheduledBatch, ScheduledRequest
from pelton.core.errors import ConfigError
from pelton.core.sampling_params import SamplingParams
from pelton.simulate.cost import COSTS, StepCost, StepShape, load_cost, save_cost, shape_of

COST = StepCost(
    name="x",
    knots=((1, 0.1), (11, 0.2), (21, 0.5)),
    sample_s=0.01,
    decode_context_s=0.001,
    prefill_pair_s=0.0001,
    kv_op_s={"load:host": 0.125},
)


@pytest.mark.parametrize(
    ("num_tokens", "seconds"), [(0, 0.1), (1, 0.1), (6, 0.15), (11, 0.2), (16, 0.35), (21, 0.5), (31, 0.8)]
)
def test_base_is_linear_between_knots_and_beyond(num_tokens: int, seconds: float) -> None:
    assert COST.base_s(num_tokens) == pytest.approx(seconds)


def scheduled(num_tokens: int, start: int, *, samples: bool) -> ScheduledRequest:
    return ScheduledRequest("r", (1,) * num_tokens, start, (), SamplingParams(), samples)


def test_a_step_is_the_sum_of_its_parts() -> None:
    batch = ScheduledBatch(
        1,
        (scheduled(1, 9, samples=True), scheduled(1, 19, samples=True), scheduled(4, 100, samples=False)),
        (KVOp(KVOpKind.LOAD, 1, 2, "host"), KVOp(KVOpKind.LOAD, 3, 4, "host"), KVOp(KVOpKind.COPY, 5, 6)),
    )
    shape = shape_of(batch, 16)
    # The chunk's tokens see 101, 102, 103 and 104 positions.
    assert shape == StepShape(6, 2, 10 + 20, 101 + 102 + 103 + 104, {"load:host": 32, "copy:device": 16})
    assert COST.step_s(shape) == pytest.approx(0.15 + 0.02 + 0.03 + 0.041 + 4.0)


def test_a_cost_comes_back_from_its_file(tmp_path: Path) -> None:
    save_cost(COST, tmp_path / "x.json", error={"median": 0.1}, machine={"processor": "none"})
    assert load_cost(str(tmp_path / "x.json")) == COST


@pytest.mark.parametrize(
    ("content", "problem"), [("{}", "not a cost file"), ("nonsense", "not a cost file"), (None, "neither a file")]
)
def test_what_is_no_cost_is_told(tmp_path: Path, content: str | None, problem: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=problem):
        load_cost(str(path))


@pytest.mark.parametrize(
    "changes", [{"knots": ((1, 0.1),)}, {"knots": ((2, 0.1), (1, 0.2))}, {"sample_s": -1.0}, {"num_kv_tokens": 0}]
)
def test_costs_that_cannot_be(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="cost x"):
        replace(COST, **changes)  # type: ignore[arg-type]


def test_larger_steps_never_cost_less() -> None:
    for cost in COSTS.values():
        seconds = [cost.base_s(num_tokens) for num_tokens in range(1, 20_000, 7)]
        assert seconds == sorted(seconds)
