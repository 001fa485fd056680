from __future__ import annotations

from concurrent.futures import Future

import pytest

from pelton.core.batch import NULL_BLOCK_ID, KVOpKind, ScheduledBatch, StepResult
from pelton.core.model_spec import KVGroupSpec
from pelton.core.request import FinishReason
from pelton.engine.engine import Engine
from tests.make import ContextExecutor, ManualClock, generate, make_engine, make_submission, run, step


def batches_of(engine: Engine) -> list[ScheduledBatch]:
    executor = engine.executor
    assert isinstance(executor, ContextExecutor)
    return executor.batches


def shares(batch: ScheduledBatch) -> dict[str, int]:
    return {scheduled.request_id: len(scheduled.token_ids) for scheduled in batch.requests}


def test_decodes_first_then_chunks_then_new_requests() -> None:
    """Sarathi-Serve, Algorithm 3."""
    engine = make_engine(max_num_batched_tokens=8, enable_overlap=False)
    engine.submit(make_submission(range(4), "decode"))
    step(engine)
    engine.submit(make_submission(range(10, 30), "long"))
    step(engine)
    engine.submit(make_submission(range(40, 43), "new"))
    run(engine)
    steps = [shares(batch) for batch in batches_of(engine)]
    assert steps[0] == {"decode": 4}
    assert steps[1] == {"decode": 1, "long": 7}
    assert steps[2] == {"decode": 1, "long": 7}
    assert steps[3] == {"decode": 1, "long": 6, "new": 1}
    assert steps[4] == {"decode": 1, "long": 1, "new": 2}


def test_every_decode_advances_every_step_and_the_budget_holds() -> None:
    engine = make_engine(max_num_batched_tokens=12, max_num_seqs=6)
    for index in range(6):
        engine.submit(make_submission(range(index, index + 30), f"r{index}", max_tokens=20))
    run(engine)
    decoding: set[str] = set()
    for batch in batches_of(engine):
        assert batch.num_tokens <= 12
        assert {request_id for request_id in decoding if request_id not in batch.finished_ids} <= shares(batch).keys()
        decoding -= set(batch.finished_ids)
        decoding |= {
            scheduled.request_id
            for scheduled in batch.requests
            if scheduled.samples and scheduled.num_computed_tokens + len(scheduled.token_ids) < 30 + 20 - 1
        }
        decoding -= {
            scheduled.request_id
            for scheduled in batch.requests
            if scheduled.num_computed_tokens + len(scheduled.token_ids) >= 30 + 20 - 1
        }


def test_the_next_step_is_scheduled_while_one_runs() -> None:
    engine = make_engine()
    engine.submit(make_submission(range(4), "r"))
    engine.dispatch()
    assert engine.num_in_flight == 2
    assert batches_of(engine)[1].requests[0].token_ids == (-1,)


class HeldExecutor:
    """Steps end when the test says so, each after a second."""

    def __init__(self) -> None:
        self.held: list[tuple[ScheduledBatch, Future[StepResult]]] = []

    def submit(self, batch: ScheduledBatch) -> Future[StepResult]:
        self.held.append((batch, Future()))
        return self.held[-1][1]

    def finish(self) -> None:
        batch, future = next(entry for entry in self.held if not entry[1].done())
        sampled = tuple((1,) if scheduled.samples else () for scheduled in batch.requests)
        future.set_result(StepResult(batch.step_id, sampled, elapsed_s=1.0))

    def close(self) -> None:
        pass


def test_the_next_step_is_made_late_and_has_who_came_meanwhile() -> None:
    clock, executor = ManualClock(), HeldExecutor()
    engine = make_engine(clock=clock, executor=executor)
    engine.submit(make_submission(range(4), "old", max_tokens=30))
    for _ in range(4):
        engine.dispatch()
        clock.time_s += 1.0
        engine.dispatch()
        executor.finish()
        engine.collect()
    engine.dispatch()
    assert engine.num_in_flight == 1
    clock.time_s += 0.5
    engine.submit(make_submission(range(5), "new"))
    engine.dispatch()
    assert engine.num_in_flight == 1
    assert engine.next_deadline_s == pytest.approx(clock.time_s + 0.25, abs=0.1)
    clock.time_s += 0.4
    engine.dispatch()
    assert engine.num_in_flight == 2
    assert "new" in shares(executor.held[-1][0])


def test_a_long_prefill_chunk_leaves_room_for_others() -> None:
    engine = make_engine(max_num_batched_tokens=16, long_prefill_chunk=6)
    engine.submit(make_submission(range(30), "long"))
    engine.submit(make_submission(range(5), "short"))
    engine.dispatch()
    assert shares(batches_of(engine)[0]) == {"long": 6, "short": 5}


def test_smaller_requests_pass_one_that_does_not_fit_but_not_for_ever() -> None:
    engine = make_engine(num_blocks=41, max_model_len=160, max_num_seqs=4, max_num_waiting=300)
    engine.submit(make_submission(range(60), "running", max_tokens=90))
    step(engine)
    engine.submit(make_submission([7] * 110, "big", max_tokens=2))
    for index in range(200):
        engine.submit(make_submission([index], f"small{index}", max_tokens=2))
    order = [output.request_id for output in run(engine) if output.finish_reason is not None]
    assert order.index("small0") < order.index("big") < order.index("small199")


def test_priority_runs_first_and_yields_last() -> None:
    engine = make_engine(policy="priority", max_num_seqs=1, enable_overlap=False)
    for name, priority in (("first", 0), ("low", 5), ("high", -1), ("mid", 1)):
        engine.submit(make_submission([1, 2], name, priority=priority, max_tokens=2))
    order = [output.request_id for output in run(engine) if output.finish_reason is not None]
    assert order == ["high", "first", "mid", "low"]
    engine = make_engine(policy="priority", num_blocks=21, max_model_len=60, enable_overlap=False)
    engine.submit(make_submission([1] * 20, "low", priority=5, max_tokens=30))
    engine.submit(make_submission([2] * 20, "high", priority=0, max_tokens=30))
    run(engine)
    assert {name for batch in batches_of(engine) for name in batch.preempted_ids} == {"low"}


def test_fcfs_preempts_the_latest_arrival() -> None:
    clock = ManualClock()
    engine = make_engine(num_blocks=21, max_model_len=60, clock=clock)
    for name in ("old", "new"):
        engine.submit(make_submission([len(name)] * 20, name, max_tokens=30))
        clock.time_s += 1
    run(engine)
    assert {name for batch in batches_of(engine) for name in batch.preempted_ids} == {"new"}


def test_a_shared_prefix_is_found_and_counted_once() -> None:
    engine = make_engine()
    prefix = [*range(100, 120)]
    first, second = make_submission([*prefix, 1, 2], "a"), make_submission([*prefix, 3, 4], "b")
    generate(engine, first)
    engine.submit(second)
    outputs = run(engine)
    assert outputs[-1].usage is not None
    assert outputs[-1].usage.num_cached_tokens == 20
    counters = engine.scheduler.counters
    assert (counters.num_prefix_queries, counters.num_prefix_hits) == (44, 20)
    assert len(batches_of(engine)[-8].requests[0].token_ids) == 2


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    engine = make_engine()
    answer = generate(engine, make_submission(range(10), "turn1", max_tokens=9))["turn1", 0]
    engine.submit(make_submission([*range(10), *answer, 5, 6], "turn2"))
    usage = run(engine)[-1].usage
    assert usage is not None
    assert usage.num_cached_tokens == 16


@pytest.mark.parametrize(("salt", "num_cached"), [("tenant-a", 20), ("tenant-b", 0)])
def test_tenants_of_different_salt_share_nothing(salt: str, num_cached: int) -> None:
    engine = make_engine()
    generate(engine, make_submission(range(22), cache_salt="tenant-a"))
    engine.submit(make_submission(range(22), cache_salt=salt))
    usage = run(engine)[-1].usage
    assert usage is not None
    assert usage.num_cached_tokens == num_cached


def test_n_sequences_share_the_prompt_and_copy_on_write() -> None:
    engine = make_engine(enable_prefix_caching=False)
    outputs = generate(engine, make_submission(range(10), "r", n=4, temperature=1.0, seed=3))
    assert len({tuple(token_ids) for token_ids in outputs.values()}) == 4
    copies = [op for batch in batches_of(engine) for op in batch.kv_ops]
    assert [op.kind for op in copies] == [KVOpKind.COPY] * 3
    # 10 prompt tokens once, and the last one again for each sibling.
    computed = sum(batch.num_tokens for batch in batches_of(engine))
    assert computed == 10 + 3 + 4 * 7


def test_blocks_outside_the_window_are_given_back() -> None:
    window = (KVGroupSpec((0,), 8),)
    engine = make_engine(groups=window, num_blocks=40, max_num_batched_tokens=8)
    engine.submit(make_submission(range(100), max_tokens=20))
    most = 0
    while engine.has_work:
        step(engine)
        most = max(most, engine.scheduler.kv.pool.num_used)
    assert most <= (8 + 2 * 8) // 4 + 2
    assert NULL_BLOCK_ID in batches_of(engine)[-1].requests[0].block_tables[0]


def test_stop_tokens_and_reasons() -> None:
    engine = make_engine()
    token_ids = generate(engine, make_submission(range(5), "free", max_tokens=6))["free", 0]
    engine.submit(make_submission(range(5), "stopped", max_tokens=6, stop_token_ids=(token_ids[3],)))
    last = run(engine)[-1]
    assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, token_ids[3])
    assert last.usage is not None
    assert last.usage.num_output_tokens == 4
    engine.submit(make_submission(range(5), "later", max_tokens=6, stop_token_ids=(token_ids[3],), min_tokens=5))
    assert run(engine)[-1].finish_reason is FinishReason.LENGTH


def test_prompt_logprobs_come_once_each_across_a_preemption() -> None:
    engine = make_engine(num_blocks=21, max_model_len=72, max_num_batched_tokens=8)
    executor = engine.executor
    assert isinstance(executor, ContextExecutor)
    executor.tells_prompt_logprobs = True
    engine.submit(make_submission([1] * 20, "old", max_tokens=40))
    step(engine)
    engine.submit(make_submission(range(50), "scored", max_tokens=2, prompt_logprobs=0))
    told = [
        entry.token_id
        for output in run(engine)
        if output.request_id == "scored"
        for entry in output.prompt_logprobs or ()
    ]
    assert {name for batch in batches_of(engine) for name in batch.preempted_ids} == {"scored"}
    assert told == list(range(1, 50))
