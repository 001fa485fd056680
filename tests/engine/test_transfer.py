"""Blocks from and to other engines: two engines over executors whose answers tell whose KV they read."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from itertools import repeat
from typing import Any

import pytest

from pelton.core.batch import INBOX, OUTBOX, BlockKey
from pelton.core.model_spec import KVGroupSpec
from pelton.core.protocols import BlockRead, WantedBlocks
from pelton.engine.engine import Engine
from tests.make import (
    FULL_ATTENTION,
    ManualClock,
    SlowBlockStore,
    generate,
    make_engine,
    make_request,
    make_submission,
    step,
)

WINDOWED = (KVGroupSpec((0,)), KVGroupSpec((1,), 6), KVGroupSpec((2,), 6))
PROMPT = list(range(30))


class Wire:
    """A `KVConnector` without a wire: one thing happens at each `tick`, so that everything else can come between.

    `problems` are taken one by one as blocks are read: true where this one comes damaged.
    """

    def __init__(
        self, num_inbox: int = 0, num_outbox: int = 0, source: Wire | None = None, problems: Iterable[bool] = ()
    ) -> None:
        self.inbox = [[-5]] * num_inbox
        self.outbox = [[-6]] * num_outbox
        self.source = source
        self.can_fetch = source is not None
        self.problems = iter(problems)
        self.num_asked = 0
        self._wanted: list[WantedBlocks] = []
        self._waiting: deque[Callable[[], bool]] = deque()

    def wake_with(self, wake: Callable[[], None]) -> None: ...

    def close(self) -> None: ...

    def take_wanted(self) -> list[WantedBlocks]:
        wanted, self._wanted = self._wanted, []
        return wanted

    def ask(self, keys: Sequence[BlockKey]) -> WantedBlocks:
        wanted = WantedBlocks(tuple(keys))
        self._wanted.append(wanted)
        return wanted

    def fetch(self, slot_ids: Sequence[int], keys: Sequence[BlockKey]) -> Future[BlockRead]:
        future: Future[BlockRead] = Future()
        source = self.source
        assert source is not None
        wanted = source.ask(keys)
        self.num_asked += len(keys)

        def read() -> bool:
            if not wanted.offer.done():
                return False
            loaded = []
            for slot_id, other_id in zip(slot_ids, wanted.offer.result(), strict=False):
                is_good = not next(self.problems, False)
                self.inbox[slot_id] = list(source.outbox[other_id]) if is_good else [-9]
                loaded.append(is_good)
            wanted.taken.set_result(None)
            loaded += [False] * (len(keys) - len(loaded))
            future.set_result(BlockRead(tuple(loaded), 1e-9))
            return True

        self._waiting.append(read)
        return future

    def tick(self) -> bool:
        for _ in range(len(self._waiting)):
            read = self._waiting.popleft()
            if read():
                return True
            self._waiting.append(read)
        return False


def make_pair(
    *, num_slots: int = 8, problems: Iterable[bool] = (), clock: Any = None, **settings: Any
) -> tuple[Engine, Engine, Wire]:
    """One that prefills, one that goes on, and the second one's connector."""
    source = Wire(num_outbox=num_slots)
    wire = Wire(num_inbox=num_slots, source=source, problems=problems)
    return make_engine(connector=source, **settings), make_engine(connector=wire, clock=clock, **settings), wire


def turn(first: Engine, second: Engine, wire: Wire) -> list[Any]:
    step(first)
    wire.tick()
    return step(second)


def hand_over(first: Engine, second: Engine, wire: Wire, *submissions: Any) -> dict[tuple[str, int], list[int]]:
    """What the second engine makes of prompts, with the first one at its side."""
    for submission in submissions:
        second.submit(submission)
    token_ids: dict[tuple[str, int], list[int]] = {}
    for _ in range(10_000):
        if not second.has_work:
            return token_ids
        for output in turn(first, second, wire):
            assert output.error is None, output.error
            token_ids.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    raise AssertionError("requests wait for ever")


def stats(engine: Engine) -> dict[str, int]:
    return engine.scheduler.kv.tier_stats()


def settle(first: Engine, second: Engine, wire: Wire) -> None:
    """Until nothing is on its way; then no slot is in use."""
    for _ in range(200):
        turn(first, second, wire)
    for engine in (first, second):
        transfer = engine.scheduler.kv.transfer
        assert transfer is not None
        transfer.check()
        assert not transfer._offers
        assert not transfer._fetching
        assert not transfer._landing


@pytest.mark.parametrize("groups", [FULL_ATTENTION, WINDOWED])
@pytest.mark.parametrize("num_slots", [1, 3, 100])
@pytest.mark.parametrize("num_host_blocks", [0, 100])
def test_a_prompt_is_computed_once(groups: tuple[KVGroupSpec, ...], num_slots: int, num_host_blocks: int) -> None:
    expected = generate(make_engine(groups=groups), make_submission(PROMPT, "r"))
    first, second, wire = make_pair(groups=groups, num_slots=num_slots, num_host_blocks=num_host_blocks)
    generate(first, make_submission(PROMPT, max_tokens=1))
    assert hand_over(first, second, wire, make_submission(PROMPT, "r")) == expected
    assert second.scheduler.counters.num_prefix_hits == 28
    assert stats(second)["num_peer_received_blocks_total"] == stats(first)["num_peer_sent_blocks_total"] > 0
    assert stats(second)["num_peer_failed_blocks_total"] == 0
    settle(first, second, wire)


@pytest.mark.parametrize(
    "other",
    [{"prompt_token_ids": [9, *PROMPT[1:]]}, {"cache_salt": "another tenant"}, {"lora_id": "an adapter"}],
    ids=["prompt", "salt", "adapter"],
)
def test_another_prompt_tenant_or_adapter_finds_nothing(other: dict[str, Any]) -> None:
    first, second, wire = make_pair()
    first.adapters.check = second.adapters.check = lambda _: None  # type: ignore[method-assign]
    first.adapters.begin = second.adapters.begin = lambda _: None  # type: ignore[method-assign]
    first.adapters.end = second.adapters.end = lambda *_: None  # type: ignore[method-assign]
    generate(first, make_submission(PROMPT, max_tokens=1))
    hand_over(first, second, wire, make_submission(**({"prompt_token_ids": PROMPT} | other)))
    assert wire.num_asked == 7
    assert second.scheduler.counters.num_prefix_hits == 0
    assert stats(first)["num_peer_sent_blocks_total"] == 0


@pytest.mark.parametrize("groups", [FULL_ATTENTION, WINDOWED])
@pytest.mark.parametrize("num_slots", [3, 100])
@pytest.mark.parametrize(("num_shared", "num_hits"), [(30, 28), (20, 20), (3, 0)])
def test_a_prompt_of_which_a_part_is_known_there(
    groups: tuple[KVGroupSpec, ...], num_slots: int, num_shared: int, num_hits: int
) -> None:
    """The next turn of a conversation, or another one that begins alike: windows end where the known part does."""
    prompt = PROMPT[:num_shared] + list(range(100, 140))
    expected = generate(make_engine(groups=groups), make_submission(prompt, "r"))
    first, second, wire = make_pair(groups=groups, num_slots=num_slots)
    generate(first, make_submission(PROMPT, max_tokens=1))
    assert hand_over(first, second, wire, make_submission(prompt, "r")) == expected
    assert second.scheduler.counters.num_prefix_hits == num_hits
    settle(first, second, wire)


def test_what_was_evicted_to_host_memory_is_sent_too() -> None:
    first, second, wire = make_pair(num_blocks=13, num_host_blocks=100, max_model_len=40)
    expected = generate(first, make_submission(PROMPT, "r"))
    for start in (100, 150, 200):
        generate(first, make_submission(range(start, start + 30)))
    assert all(first.scheduler.kv.pool.find(key) is None for key in first_keys(first))
    assert hand_over(first, second, wire, make_submission(PROMPT, "r")) == expected
    assert second.scheduler.counters.num_prefix_hits == 28


def test_disk_first_and_a_peer_for_the_rest() -> None:
    disk = SlowBlockStore()
    before = make_engine(num_host_blocks=100, disk=disk)
    generate(before, make_submission(PROMPT[:13], max_tokens=1))
    while disk.tick() or len(disk.files) < 3:
        step(before)
    first, second, wire = make_pair()
    expected = generate(first, make_submission(PROMPT, "r"))
    second = make_engine(num_host_blocks=100, disk=disk, connector=wire)
    second.submit(make_submission(PROMPT, "r"))
    for _ in range(20):
        turn(first, second, wire)
    assert wire.num_asked == 0  # the disk has not answered
    assert second.stats().num_deferred == 1
    while disk.tick():
        step(second)
    assert hand_over(first, second, wire) == expected
    assert wire.num_asked == 4
    assert second.scheduler.counters.num_prefix_hits == 28


def first_keys(engine: Engine) -> list[BlockKey]:
    """Of the blocks that the prompt begins with."""
    asking = make_request(PROMPT)
    engine.scheduler.kv.prepare(asking)
    return [(0, block_hash) for block_hash in asking.block_hashes]


def test_an_engine_that_never_answers_costs_bounded_time() -> None:
    clock = ManualClock()
    first, second, wire = make_pair(clock=clock)
    expected = generate(first, make_submission(PROMPT, "r"))
    second.submit(make_submission(PROMPT, "r"))
    for _ in range(50):
        step(second)
        assert second.num_in_flight == 0
        assert second.stats().num_deferred == 1
    deadline_s = second.next_deadline_s
    assert deadline_s is not None
    assert 0 < deadline_s < 1
    clock.time_s = deadline_s
    token_ids: list[int] = []
    while second.has_work:
        token_ids += [token_id for output in step(second) for token_id in output.token_ids]
    assert token_ids == expected["r", 0]
    # Whatever comes now is not too late for others.
    settle(first, second, wire)
    assert stats(second)["num_peer_received_blocks_total"] == 7


def test_damage_is_computed_again_and_what_came_before_it_is_used() -> None:
    first, second, wire = make_pair(problems=[False, False, True, *repeat(False, 20)])
    expected = generate(first, make_submission(PROMPT, "r"))
    assert hand_over(first, second, wire, make_submission(PROMPT, "r")) == expected
    assert second.scheduler.counters.num_prefix_hits == 8
    assert stats(second)["num_peer_failed_blocks_total"] == 1


@pytest.mark.parametrize("failing", ["first", "second"])
def test_a_step_that_moved_nothing_hands_nothing_over(failing: str) -> None:
    """The first engine's copies into its outbox, or the second one's out of its inbox."""
    expected = generate(make_engine(), make_submission(PROMPT, "r"))
    first, second, wire = make_pair(enable_overlap=False)
    generate(first, make_submission(PROMPT, max_tokens=1))
    executor = (first if failing == "first" else second).executor
    executor.fails_before_moving = True  # type: ignore[attr-defined]
    executor.fail_next = OSError("nothing was moved")  # type: ignore[attr-defined]
    second.submit(make_submission(PROMPT))
    for _ in range(200):
        turn(first, second, wire)
    assert executor.fail_next is None  # type: ignore[attr-defined]
    assert hand_over(first, second, wire, make_submission(PROMPT, "r")) == expected
    settle(first, second, wire)


def test_a_full_cache_drops_what_comes() -> None:
    first, second, wire = make_pair(num_blocks=21, max_model_len=80)
    generate(first, make_submission(PROMPT, max_tokens=1))
    second.submit(make_submission(range(100, 164), "long", max_tokens=16))
    while second.scheduler.kv.pool.num_used < 17:
        turn(first, second, wire)
    answers = hand_over(first, second, wire, make_submission(PROMPT, "r"))
    assert answers["r", 0] == generate(make_engine(), make_submission(PROMPT, "r"))["r", 0]
    assert len(answers["long", 0]) == 15  # one was there before
    assert stats(second)["num_peer_received_blocks_total"] == 7
    assert stats(second)["num_peer_dropped_blocks_total"] == 4


def test_prompts_with_logprobs_do_not_wait() -> None:
    _, second, wire = make_pair()
    second.submit(make_submission(PROMPT, prompt_logprobs=0))
    step(second)
    assert wire.num_asked == 0
    assert second.scheduler.running


def test_what_a_failed_step_has_copied_is_not_offered() -> None:
    first, second, wire = make_pair()
    generate(first, make_submission(PROMPT, max_tokens=1))
    executor: Any = first.executor
    executor.fail_next = RuntimeError("the device is gone")
    assert wire.source is not None
    wanted = wire.source.ask(first_keys(first))
    while not wanted.offer.done():
        step(first)
    assert wanted.offer.result() == ()
    wanted.taken.set_result(None)
    settle(first, second, wire)


def test_what_would_not_pay_is_measured_now_and_then() -> None:
    """Assumed speeds are a guess, and one slow reading must not be the last."""
    clock = ManualClock()
    first, second, wire = make_pair(clock=clock, num_blocks=100)
    transfer = second.scheduler.kv.transfer
    assert transfer is not None
    transfer.costs.bytes_per_token = transfer._num_block_bytes = 1 << 30
    prompts = [range(start, start + 30) for start in (0, 100, 200)]
    for prompt in prompts:
        generate(first, make_submission(prompt, max_tokens=1))
    for prompt, num_asked in zip(prompts[:2], (7, 7), strict=True):
        second.submit(make_submission(prompt, f"r{prompt[0]}", max_tokens=1))
        assert second.stats().num_deferred == 0  # for nobody to wait for
        assert wire.num_asked == num_asked
    while second.has_work:
        turn(first, second, wire)
    settle(first, second, wire)
    num_hits = second.scheduler.counters.num_prefix_hits
    second.submit(make_submission(prompts[2], "r2"))
    assert second.stats().num_deferred == 1
    hand_over(first, second, wire)
    assert second.scheduler.counters.num_prefix_hits == num_hits + 28


def test_a_cancelled_request_leaves_nothing() -> None:
    first, second, wire = make_pair()
    generate(first, make_submission(PROMPT, max_tokens=1))
    second.submit(make_submission(PROMPT, "r"))
    second.cancel("r")
    assert second.stats().num_deferred == 0
    settle(first, second, wire)
    assert second.scheduler.kv.pool.num_used == 0


def test_an_engine_that_is_gone_before_its_blocks_are_copied_holds_no_slot() -> None:
    first, second, wire = make_pair()
    generate(first, make_submission(PROMPT, max_tokens=1))
    assert wire.source is not None
    wanted = wire.source.ask(first_keys(first))
    first.dispatch()  # the step that copies
    wanted.taken.set_result(None)
    settle(first, second, wire)
    gone = wire.source.ask(first_keys(first))
    gone.taken.set_result(None)
    settle(first, second, wire)
    assert not gone.offer.done()


@pytest.mark.parametrize("groups", [FULL_ATTENTION, WINDOWED])
@pytest.mark.parametrize("enable_overlap", [True, False])
def test_random_traffic_over_two_engines(groups: tuple[KVGroupSpec, ...], enable_overlap: bool) -> None:
    """Caches and boxes too small for anything, one block in five damaged, cancels: answers stay those of one engine."""
    rng = random.Random(8)
    size = len(groups)
    problems = (rng.random() < 0.2 for _ in repeat(None))
    first, second, wire = make_pair(
        groups=groups,
        num_slots=5,
        problems=problems,
        enable_overlap=enable_overlap,
        num_blocks=1 + 14 * size,
        num_host_blocks=1 + 6 * size,
        max_model_len=48,
    )
    alone = make_engine(groups=groups)
    expected: dict[tuple[int, ...], list[int]] = {}
    answers: dict[str, list[int]] = {}
    prompts: dict[str, tuple[int, ...]] = {}

    def turn(ticks: bool) -> None:
        outputs = step(first)
        if ticks:
            wire.tick()
        for output in (*outputs, *step(second)):
            answers.setdefault(output.request_id, []).extend(output.token_ids)
            if output.error is not None:
                del prompts[output.request_id]

    for index in range(120):
        prompt = tuple([rng.randrange(3)] * 8 + list(range(rng.choice([6, 17, 25]))))
        if prompt not in expected:
            expected[prompt] = generate(alone, make_submission(prompt, "r", max_tokens=6))["r", 0]
        engine = rng.choice([first, second])
        prompts[f"r{index}"] = prompt
        engine.submit(make_submission(prompt, f"r{index}", max_tokens=6))
        if rng.random() < 0.1:
            engine.cancel(f"r{index}")
        for _ in range(rng.randrange(6)):
            turn(rng.random() < 0.7)
    for _ in range(2000):
        turn(True)
    assert not first.has_work
    assert not second.has_work
    for request_id, prompt in prompts.items():
        assert answers[request_id] == expected[prompt], request_id
    assert stats(second)["num_peer_received_blocks_total"] > 30
    assert stats(second)["num_peer_failed_blocks_total"] > 5
    settle(first, second, wire)


def test_moves_name_only_what_they_should() -> None:
    first, second, wire = make_pair()
    generate(first, make_submission(PROMPT, max_tokens=1))
    hand_over(first, second, wire, make_submission(PROMPT))
    executors: list[Any] = [first.executor, second.executor]
    tiers = [{op.tier for batch in executor.batches for op in batch.kv_ops} for executor in executors]
    assert tiers == [{OUTBOX}, {INBOX}]
