"""Background requests take what others leave; priority orders a tenant's requests under every policy."""

from __future__ import annotations

import pytest

from pelton.core.request import MAX_PRIORITY_S, Request, Submission
from pelton.core.sampling_params import SamplingParams
from pelton.engine.background import BACKGROUND_TURN
from pelton.engine.engine import Engine
from pelton.engine.policies import POLICIES
from tests.make import make_engine


def submit(engine: Engine, request_id: str, *, num_tokens: int = 40, **options: object) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    engine.submit(Submission(request_id=request_id, prompt_token_ids=[1, 2, 3], sampling=sampling, **options))  # type: ignore[arg-type]


def run(engine: Engine) -> list[set[str]]:
    """Who was in each step."""
    steps = []
    while engine.has_work:
        batch = engine.scheduler.schedule()
        assert batch is not None
        steps.append({scheduled.request_id for scheduled in batch.requests})
        engine._in_flight.append((batch, engine.executor.submit(batch)))
        engine.collect()
        engine.scheduler.kv.check(engine.scheduler.running)
        engine.take_update()
    return steps


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_background_requests_leave_most_steps_to_others(policy: str) -> None:
    engine = make_engine(policy=policy, enable_overlap=False)
    submit(engine, "back", is_background=True)
    submit(engine, "front", num_tokens=33)
    steps = run(engine)
    both = [step for step in steps if "front" in step]
    shared = sum("back" in step for step in both)
    assert 3 <= shared <= 33 // BACKGROUND_TURN + 2
    assert [step for step in steps if "front" not in step] == [{"back"}] * (40 - shared)


def test_alone_a_background_request_has_every_step() -> None:
    engine = make_engine(enable_overlap=False)
    submit(engine, "back", is_background=True)
    assert len(run(engine)) == 40


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_lower_priority_number_goes_first(policy: str) -> None:
    engine = make_engine(policy=policy, enable_overlap=False, max_num_seqs=1)
    for name, priority in (("first", 0), ("late", 5), ("urgent", -5), ("last", 10_000)):
        submit(engine, name, priority=priority, num_tokens=2)
    order = list(dict.fromkeys(name for step in run(engine) for name in step))
    assert order == ["urgent", "first", "late", "last"]


def test_nobody_is_overtaken_for_ever() -> None:
    options = {"prompt_token_ids": [1], "sampling": SamplingParams(), "arrival_time_s": 100.0}
    low = Request(request_id="a", priority=2**31 - 1, **options)  # type: ignore[arg-type]
    assert low.rank_time_s == 100.0 + MAX_PRIORITY_S
