"""The laws of the house that need no model, on random traffic through the production scheduler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pelton.core.model_spec import KVGroupSpec
from pelton.core.output import RequestOutput
from pelton.core.request import FinishReason, Submission
from pelton.engine.engine import Engine
from pelton.engine.kv.block_hash import is_private
from pelton.engine.kv.eviction import EVICTIONS
from pelton.engine.policies import POLICIES
from tests.make import (
    FULL_ATTENTION,
    ManualClock,
    SlowBlockStore,
    check_ledger,
    generate,
    make_engine,
    make_submission,
    step,
)

WINDOWED = (KVGroupSpec((0,)), KVGroupSpec((1,), 6), KVGroupSpec((2,), 6))
ONLY_WINDOWED = (KVGroupSpec((0,), 9),)

# Few distinct tokens and lengths around block borders: prefixes are shared often.
prompts = st.one_of(
    st.lists(st.integers(0, 2), min_size=1, max_size=40),
    st.builds(lambda n, tail: [7] * n + tail, st.integers(1, 40), st.lists(st.integers(0, 2), max_size=5)),
)


@dataclass
class Arrival:
    after_steps: int
    submission: Submission
    cancel_after: int | None


@st.composite
def traffic(draw: st.DrawFn) -> list[Arrival]:
    arrivals = []
    for index in range(draw(st.integers(1, 12))):
        submission = make_submission(
            draw(prompts),
            f"t{index}",
            max_tokens=draw(st.integers(1, 24)),
            n=draw(st.sampled_from([1, 1, 1, 2, 3])),
            temperature=draw(st.sampled_from([0.0, 1.0])),
            seed=index,
            ignore_eos=True,
            cache_salt=draw(st.sampled_from(["", "", "other"])),
            priority=draw(st.integers(0, 2)),
        )
        cancel_after = draw(st.one_of(st.none(), st.none(), st.integers(0, 20)))
        arrivals.append(Arrival(draw(st.integers(0, 6)), submission, cancel_after))
    return arrivals


def drive(engine: Engine, arrivals: list[Arrival], on_step: Callable[[], object] = lambda: None) -> list[RequestOutput]:
    """Play the arrivals; the ledger is checked after every step."""
    outputs: list[RequestOutput] = []
    cancellations: dict[int, list[str]] = {}
    now = 0

    def take_step() -> None:
        nonlocal now
        outputs.extend(step(engine))
        on_step()
        now += 1
        for request_id in cancellations.pop(now, ()):
            engine.cancel(request_id)

    for arrival in arrivals:
        for _ in range(arrival.after_steps):
            take_step()
        engine.submit(arrival.submission)
        if arrival.cancel_after is not None:
            cancellations.setdefault(now + 1 + arrival.cancel_after, []).append(arrival.submission.request_id)
    for _ in range(5000):
        if not engine.has_work:
            break
        take_step()
    assert not engine.has_work, "requests wait for ever"
    check_ledger(engine)
    update = engine.take_update()
    return outputs + (list(update.outputs) if update else [])


def check_answers(arrivals: list[Arrival], groups: tuple[KVGroupSpec, ...], outputs: list[RequestOutput]) -> None:
    """Law 3: every request got what it gets alone; one that was cancelled, the beginning of it."""
    token_ids: dict[tuple[str, int], list[int]] = {}
    ended: dict[tuple[str, int], FinishReason] = {}
    for output in outputs:
        key = output.request_id, output.index
        assert output.error is None or output.finish_reason is FinishReason.CANCELLED, output.error
        assert key not in ended, "output after the end"
        token_ids.setdefault(key, []).extend(output.token_ids)
        if output.finish_reason is not None:
            ended[key] = output.finish_reason
    for arrival in arrivals:
        submission = arrival.submission
        alone = generate(make_engine(groups=groups, enable_overlap=False, max_model_len=72), submission)
        for index in range(submission.sampling.n):
            key = submission.request_id, index
            got = token_ids.get(key, [])
            if ended[key] is FinishReason.CANCELLED:
                assert arrival.cancel_after is not None
                assert got == alone[key][: len(got)]
            else:
                assert ended[key] is FinishReason.LENGTH
                assert got == alone[key]


def check_nothing_is_held(engine: Engine) -> None:
    kv = engine.scheduler.kv
    kv.check(())
    pools = [kv.pool] if kv.tiers is None else [kv.pool, kv.tiers.host]
    for pool in pools:
        assert pool.num_used == 0
        assert not any(is_private(key[1]) for key in pool.published_keys()), "hashes of an ended request's own"


@settings(max_examples=300, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(
    arrivals=traffic(),
    groups=st.sampled_from([FULL_ATTENTION, WINDOWED, ONLY_WINDOWED]),
    num_blocks=st.sampled_from([72, 90, 300]),
    max_num_batched_tokens=st.sampled_from([8, 16, 64]),
    chunk=st.sampled_from([None, 3]),
    enable_prefix_caching=st.booleans(),
    enable_overlap=st.booleans(),
    policy=st.sampled_from(list(POLICIES)),
    num_host_blocks=st.sampled_from([0, 0, 3, 12, 400]),
    eviction=st.sampled_from(list(EVICTIONS)),
)
def test_same_answer_whatever_the_load_and_the_ledger_balances(
    arrivals: list[Arrival],
    groups: tuple[KVGroupSpec, ...],
    num_blocks: int,
    max_num_batched_tokens: int,
    chunk: int | None,
    enable_prefix_caching: bool,
    enable_overlap: bool,
    policy: str,
    num_host_blocks: int,
    eviction: str,
) -> None:
    engine = make_engine(
        groups=groups,
        num_blocks=num_blocks,
        max_num_seqs=8,
        max_num_batched_tokens=max_num_batched_tokens,
        long_prefill_chunk=chunk,
        enable_prefix_caching=enable_prefix_caching,
        enable_overlap=enable_overlap,
        policy=policy,
        max_model_len=72,
        num_host_blocks=num_host_blocks,
        eviction=eviction,
    )
    check_answers(arrivals, groups, drive(engine, arrivals))
    check_nothing_is_held(engine)


@settings(max_examples=120, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(
    arrivals=traffic(),
    groups=st.sampled_from([FULL_ATTENTION, WINDOWED, ONLY_WINDOWED]),
    num_blocks=st.sampled_from([72, 300]),
    num_host_blocks=st.sampled_from([3, 12, 60, 400]),
    num_disk_blocks=st.sampled_from([2, 30, 10**6]),
    disk_speed=st.integers(0, 4),
    problems=st.lists(st.booleans(), max_size=40),
    enable_overlap=st.booleans(),
    policy=st.sampled_from(list(POLICIES)),
    eviction=st.sampled_from(list(EVICTIONS)),
)
def test_same_answer_with_a_disk_that_is_slow_and_fails_and_after_a_restart(
    arrivals: list[Arrival],
    groups: tuple[KVGroupSpec, ...],
    num_blocks: int,
    num_host_blocks: int,
    num_disk_blocks: int,
    disk_speed: int,
    problems: list[bool],
    enable_overlap: bool,
    policy: str,
    eviction: str,
) -> None:
    disk = SlowBlockStore(problems)
    for _ in range(2):
        clock = ManualClock()
        engine = make_engine(
            groups=groups,
            num_blocks=num_blocks,
            enable_overlap=enable_overlap,
            policy=policy,
            max_model_len=72,
            num_host_blocks=num_host_blocks,
            disk=disk,
            num_disk_blocks=num_disk_blocks,
            clock=clock,
            eviction=eviction,
        )

        def pass_time(clock: ManualClock = clock) -> None:
            clock.time_s += 0.01
            for _ in range(disk_speed):
                disk.tick()

        check_answers(arrivals, groups, drive(engine, arrivals, pass_time))
        step(engine)
        while disk.tick() or engine.num_in_flight:
            step(engine)
        check_nothing_is_held(engine)
        assert len(disk.files) <= num_disk_blocks


@pytest.mark.parametrize(("groups", "num_blocks"), [(FULL_ATTENTION, 21), (WINDOWED, 52)])
def test_forced_preemption_changes_no_answer(groups: tuple[KVGroupSpec, ...], num_blocks: int) -> None:
    submissions = [make_submission([index] * 17, max_tokens=40) for index in range(8)]
    engine = make_engine(groups=groups, num_blocks=num_blocks, max_model_len=60)
    together = generate(engine, *submissions)
    assert engine.scheduler.counters.num_preemptions > 0
    for submission in submissions:
        alone = generate(make_engine(groups=groups), submission)
        assert together[submission.request_id, 0] == alone[submission.request_id, 0]
