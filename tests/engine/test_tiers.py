"""Host memory behind the device's KV cache."""

from __future__ import annotations

import random
from itertools import repeat

import pytest

from pelton.core.batch import KVOpKind
from pelton.core.model_spec import KVGroupSpec
from pelton.engine.engine import Engine
from pelton.engine.kv.eviction import EVICTIONS
from tests.make import (
    FULL_ATTENTION,
    ContextExecutor,
    ManualClock,
    SlowBlockStore,
    generate,
    make_engine,
    make_request,
    make_submission,
    run,
    step,
)

WINDOWED = (KVGroupSpec((0,)), KVGroupSpec((1,), 6), KVGroupSpec((2,), 6))


def moves(engine: Engine, kind: KVOpKind) -> int:
    assert isinstance(engine.executor, ContextExecutor)
    return sum(op.kind is kind for batch in engine.executor.batches for op in batch.kv_ops)


@pytest.mark.parametrize(("groups", "num_blocks"), [(FULL_ATTENTION, 21), (WINDOWED, 52)])
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("enable_overlap", [True, False])
def test_preemption_loses_no_token(
    groups: tuple[KVGroupSpec, ...], num_blocks: int, enable_prefix_caching: bool, enable_overlap: bool
) -> None:
    """Eight requests that need four times the cache: what is preempted comes back from host memory."""
    submissions = [make_submission([index] * 17, max_tokens=40) for index in range(8)]
    settings = {
        "groups": groups,
        "max_model_len": 60,
        "enable_prefix_caching": enable_prefix_caching,
        "enable_overlap": enable_overlap,
    }
    alone = [generate(make_engine(**settings), submission) for submission in submissions]
    engine = make_engine(num_blocks=num_blocks, num_host_blocks=400, **settings)
    together = generate(engine, *submissions)
    for submission, expected in zip(submissions, alone, strict=True):
        assert together[submission.request_id, 0] == expected[submission.request_id, 0]
    assert engine.scheduler.counters.num_preemptions > 0
    assert engine.scheduler.counters.num_recomputed_tokens == 0
    assert moves(engine, KVOpKind.LOAD) > 0
    without = make_engine(num_blocks=num_blocks, **settings)
    generate(without, *submissions)
    assert without.scheduler.counters.num_recomputed_tokens > 0


def test_an_evicted_prefix_comes_back_and_is_stored_once() -> None:
    engine = make_engine(num_blocks=13, num_host_blocks=100, max_model_len=40)
    first = make_submission(range(32), "first", max_tokens=2)
    other = make_submission(range(100, 132), max_tokens=2)
    expected = generate(engine, first)["first", 0]
    for round in range(3):
        generate(engine, make_submission(other.prompt_token_ids, max_tokens=2))
        again = generate(engine, make_submission(first.prompt_token_ids, f"again{round}", max_tokens=2))
        assert again[f"again{round}", 0] == expected
    assert engine.scheduler.counters.num_prefix_hits == 5 * 28
    assert moves(engine, KVOpKind.LOAD) > 16 >= moves(engine, KVOpKind.STORE)


@pytest.mark.parametrize("failing", ["a", "b"])
def test_what_a_failed_step_was_to_move_is_not_found(failing: str) -> None:
    """Prompt "a" comes back from host memory, "b" sends it there; whichever step fails, "a" is right afterwards."""
    engine = make_engine(num_blocks=13, num_host_blocks=100, max_model_len=40, enable_overlap=False)
    executor = engine.executor
    assert isinstance(executor, ContextExecutor)
    executor.fails_before_moving = True
    prompts = {"a": range(32), "b": range(100, 132)}
    expected = generate(engine, make_submission(prompts["a"], "first", max_tokens=2))["first", 0]
    for name in ("b", "a"):
        if name == failing:
            executor.fail_next = OSError("nothing was moved")
            engine.submit(make_submission(prompts[name], max_tokens=2))
            assert any(output.error is not None for output in run(engine))
            moved = [op.kind for op in executor.batches[-1].kv_ops]
            assert KVOpKind.LOAD in moved if name == "a" else KVOpKind.STORE in moved
        else:
            generate(engine, make_submission(prompts[name], max_tokens=2))
    assert generate(engine, make_submission(prompts["a"], "again", max_tokens=2))["again", 0] == expected


def test_a_load_that_costs_more_than_computing_is_not_made() -> None:
    engine = make_engine(num_blocks=13, num_host_blocks=100, max_model_len=40)
    tiers = engine.scheduler.kv.tiers
    assert tiers is not None
    tiers.costs.prefill.observe(1000, 0, 1e-9)
    tiers._num_block_bytes = 1000
    prompts = [range(32), range(100, 132), range(32)]
    for prompt in prompts:
        generate(engine, make_submission(prompt, max_tokens=2))
    assert moves(engine, KVOpKind.LOAD) == 0
    assert moves(engine, KVOpKind.STORE) > 0


def test_host_memory_that_is_full_keeps_what_was_used_last() -> None:
    engine = make_engine(num_blocks=13, num_host_blocks=10, max_model_len=40)
    for start in (0, 50, 100, 150):
        generate(engine, make_submission(range(start, start + 32), max_tokens=2))
    assert engine.scheduler.kv.tiers is not None
    assert engine.scheduler.kv.tiers.host.num_cached == 9
    generate(engine, make_submission(range(100, 132), max_tokens=2))
    assert moves(engine, KVOpKind.LOAD) > 0


def test_a_preempted_request_that_is_cancelled_leaves_nothing_of_its_own() -> None:
    engine = make_engine(num_blocks=21, num_host_blocks=100, max_model_len=60)
    submissions = [make_submission([index] * 17, max_tokens=40) for index in range(8)]
    for submission in submissions:
        engine.submit(submission)
    while not engine.scheduler.counters.num_preemptions:
        engine.dispatch()
        engine.collect()
    for submission in submissions:
        engine.cancel(submission.request_id)
    while engine.has_work:
        engine.collect()
    kv = engine.scheduler.kv
    assert kv.tiers is not None
    kv.check(())
    assert kv.pool.num_used == kv.tiers.host.num_used == 0
    assert all(len(key[1]) == 16 for pool in (kv.pool, kv.tiers.host) for key in pool.published_keys())


@pytest.mark.parametrize("eviction", sorted(EVICTIONS))
@pytest.mark.parametrize("groups", [FULL_ATTENTION, WINDOWED])
def test_tiers_too_small_for_anything_give_right_answers(groups: tuple[KVGroupSpec, ...], eviction: str) -> None:
    """What is to be loaded is the oldest in host memory, and making room for it evicts to host memory."""
    rng = random.Random(4)
    size = len(groups)
    engine = make_engine(
        groups=groups, num_blocks=1 + 12 * size, num_host_blocks=1 + 9 * size, max_model_len=40, eviction=eviction
    )
    expected: dict[int, list[int]] = {}
    for index in range(150):
        start = rng.randrange(4)
        prompt = [start] * 4 + list(range(rng.choice([12, 24, 28])))
        token_ids = generate(engine, make_submission(prompt, f"r{index}", max_tokens=3))[f"r{index}", 0]
        key = 100 * start + len(prompt)
        assert token_ids == expected.setdefault(key, token_ids)
    assert moves(engine, KVOpKind.LOAD) > 0


def test_a_chunk_that_ends_within_a_block_is_kept_to_its_last_token() -> None:
    kv = make_engine(num_host_blocks=10).scheduler.kv
    request = make_request(range(30))
    kv.prepare(request)
    kv.admit(request, kv.match(request))
    assert kv.try_extend(request, 10) is not None
    request.num_computed_tokens = 10
    kv.preempt(request)
    match = kv.match(request)
    assert match.num_tokens == 10
    assert kv.match(make_request(range(30))).num_tokens == 0, "nobody else finds what is not committed"
    assert kv.can_admit(request, match, 0)
    kv.admit(request, match)
    kv.check([request])
    assert kv.match(make_request(range(30), block_hashes=list(request.block_hashes))).num_tokens == 8
    kv.free(request)
    kv.check([])


@pytest.mark.parametrize("is_damaged", [False, True])
def test_after_a_restart_what_cannot_be_read_is_computed(is_damaged: bool) -> None:
    disk = SlowBlockStore()
    prompt = list(range(40))
    engine = make_engine(num_host_blocks=100, disk=disk)
    expected = generate(engine, make_submission(prompt, "a"))["a", 0]
    step(engine)
    while disk.tick() or engine.num_in_flight:
        step(engine)
    assert len(disk.files) == 11
    disk.problems = repeat(is_damaged)
    engine = make_engine(num_host_blocks=100, disk=disk)
    engine.submit(make_submission(prompt, "b"))
    assert engine.num_waiting == 1
    assert engine.scheduler.schedule() is None, "held back until its blocks are there"
    assert disk.tick()
    assert generate(engine, make_submission([1], "c"))["b", 0] == expected
    stats = engine.stats()
    assert stats.num_disk_hit_tokens_total == (0 if is_damaged else 36)
    assert stats.num_disk_failed_reads_total == (9 if is_damaged else 0)


def test_a_disk_that_does_not_answer_holds_nobody_up() -> None:
    disk = SlowBlockStore()
    prompt = list(range(40))
    engine = make_engine(num_host_blocks=100, disk=disk)
    expected = generate(engine, make_submission(prompt, "a"))["a", 0]
    step(engine)
    while disk.tick() or engine.num_in_flight:
        step(engine)
    clock = ManualClock()
    engine = make_engine(num_host_blocks=100, disk=disk, clock=clock)
    engine.submit(make_submission(prompt, "b"))
    step(engine)
    assert engine.num_waiting == 1
    clock.time_s = engine.next_deadline_s or 0.0
    assert generate(engine, make_submission([1], "c"))["b", 0] == expected
    assert engine.stats().num_disk_hit_tokens_total == 0


def test_cancelled_while_it_is_held_back() -> None:
    disk = SlowBlockStore()
    engine = make_engine(num_host_blocks=100, disk=disk)
    generate(engine, make_submission(range(40), "a"))
    step(engine)
    while disk.tick() or engine.num_in_flight:
        step(engine)
    engine = make_engine(num_host_blocks=100, disk=disk)
    engine.submit(make_submission(range(40), "b"))
    engine.cancel("b")
    assert engine.num_waiting == 0
    assert not engine.has_work
    while disk.tick() or engine.num_in_flight:
        step(engine)
    step(engine)
    tiers = engine.scheduler.kv.tiers
    assert tiers is not None
    assert tiers.host.num_used == 0
