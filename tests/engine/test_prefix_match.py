"""What is remembered of prefix matches says what looking everything up again would say."""

from __future__ import annotations

import random

import pytest

from pelton.core.model_spec import KVGroupSpec
from pelton.core.request import Request
from pelton.core.sampling_params import SamplingParams
from pelton.engine.kv import block_pool
from pelton.engine.kv.block_pool import BlockPool
from pelton.engine.kv.costs import KVCosts
from pelton.engine.kv.manager import KVManager
from pelton.engine.kv.prefix_match import PrefixMatch
from pelton.engine.kv.tiers import KVTiers

BLOCK_SIZE = 4
FULL = (KVGroupSpec((0,)),)
WITH_WINDOW = (KVGroupSpec((0,)), KVGroupSpec((1,), sliding_window=10))


def make_request(rng: random.Random, number: int) -> Request:
    """Prompts that branch off each other at any place."""
    token_ids = [branch for branch in (rng.randrange(2) for _ in range(8)) for _ in range(rng.randrange(1, 6))]
    return Request(
        request_id=f"r{number}",
        prompt_token_ids=[7] * 9 + token_ids,
        sampling=SamplingParams(max_tokens=100),
        arrival_time_s=0.0,
        max_num_tokens=200,
    )


def match_afresh(kv: KVManager, request: Request) -> PrefixMatch:
    memo, request.prefix_memo = request.prefix_memo, None
    match = kv.match(request)
    request.prefix_memo = memo
    return match


def compute(kv: KVManager, request: Request, num_tokens: int) -> bool:
    start = request.num_computed_tokens
    if kv.try_extend(request, num_tokens) is None:
        return False
    request.num_computed_tokens = start + num_tokens
    while request.num_known_tokens <= request.num_computed_tokens:
        request.output_token_ids.append(1)
    kv.commit(request, start, request.num_computed_tokens)
    return True


@pytest.mark.parametrize("groups", [FULL, WITH_WINDOW])
@pytest.mark.parametrize("num_host_blocks", [0, 24])
@pytest.mark.parametrize("num_kept", [8, 4096])
def test_a_remembered_match_is_the_one_that_would_be_found(
    groups: tuple[KVGroupSpec, ...], num_host_blocks: int, num_kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_pool, "REMOVALS_KEPT", num_kept)  # few: memos that have missed too much start again
    costs = KVCosts()
    tiers = KVTiers(BlockPool(num_host_blocks), costs, num_block_bytes=1) if num_host_blocks else None
    kv = KVManager(groups, BlockPool(40 * len(groups)), BLOCK_SIZE, tiers=tiers)
    rng = random.Random(len(groups) + num_host_blocks)
    waiting: list[Request] = []
    running: list[Request] = []
    lengths = set()
    for number in range(1500):
        if len(waiting) < 6:
            waiting.append(make_request(rng, number))
            kv.prepare(waiting[-1])
        request = rng.choice(waiting)
        match = kv.match(request)
        assert match == match_afresh(kv, request)
        lengths.add(match.num_tokens)
        if kv.can_admit(request, match, 2) != (kv.num_blocks_short(request, match, 2) <= 0):
            raise AssertionError("the quick look and the exact count disagree")
        if kv.can_admit(request, match, 2):
            kv.admit(request, match)
            waiting.remove(request)
            running.append(request)
        for other in rng.sample(running, min(2, len(running))):
            num_wanted = max(1, min(other.num_known_tokens - other.num_computed_tokens, rng.randrange(1, 9)))
            if not compute(kv, other, num_wanted) or rng.random() < 0.1:
                running.remove(other)
                kv.preempt(other)
                waiting.append(other)
            elif other.num_known_tokens > 60 or rng.random() < 0.15:
                running.remove(other)
                kv.forget(other)
                kv.free(other)
        if tiers is not None:
            tiers.complete(kv.take_moves(0), 1e-3)
            costs.copies_from("host").observe(1, rng.choice((1e-6, 1.0)))  # loading pays, or not
        kv.check(running)
    assert len(lengths) > 5
