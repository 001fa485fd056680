"""What the worker learns, replaces and forgets."""

from __future__ import annotations

import pytest

from pelton.core.batch import PENDING_TOKEN_ID, RequestContext, ScheduledBatch, ScheduledRequest
from pelton.core.sampling_params import SamplingParams
from pelton.worker.request_state import RequestState, RequestStates
from pelton.worker.sampling.reference import ReferenceSampler

GREEDY = SamplingParams(temperature=0.0)
SAMPLER = ReferenceSampler(50, {0})


def scheduled(
    request_id: str,
    token_ids: tuple[int, ...] = (1,),
    num_computed: int = 0,
    context: RequestContext | None = None,
    sampling: SamplingParams = GREEDY,
) -> ScheduledRequest:
    return ScheduledRequest(request_id, token_ids, num_computed, ((1,),), sampling, True, context=context)


def context(prompt: tuple[int, ...] = (1, 2), outputs: tuple[int, ...] = ()) -> RequestContext:
    return RequestContext(prompt, outputs, seed=9)


def known(states: RequestStates, request_id: str) -> RequestState:
    state = states.get(request_id)
    assert state is not None
    return state


def test_a_request_lives_from_its_context_until_it_is_finished() -> None:
    states = RequestStates(SAMPLER, vocab_size=50)
    assert (
        states.update(ScheduledBatch(1, (scheduled("a", context=context()), scheduled("b", context=context())))) == {}
    )
    known(states, "a").add_output(7)
    assert states.update(ScheduledBatch(2, (scheduled("a"), scheduled("b")))) == {}
    assert known(states, "a").output_token_ids == [7]
    # "a" may be in the very batch that was scheduled before its end was known; then it is named.
    assert states.update(ScheduledBatch(3, (scheduled("b"),), finished_ids=("a", "never seen"))) == {}
    assert states.get("a") is None
    assert len(states) == 1


def test_a_context_replaces_what_was_remembered() -> None:
    states = RequestStates(SAMPLER, vocab_size=50)
    states.update(ScheduledBatch(1, (scheduled("a", context=context()),)))
    known(states, "a").add_output(7)
    states.update(ScheduledBatch(2, (), preempted_ids=("a",)))
    assert states.get("a") is None
    states.update(ScheduledBatch(3, (scheduled("a", context=context(outputs=(7, 8))),), preempted_ids=("a",)))
    assert known(states, "a").output_token_ids == [7, 8]
    states.update(ScheduledBatch(4, (scheduled("a", context=context(outputs=(7,))),)))
    assert known(states, "a").output_token_ids == [7]


@pytest.mark.parametrize("bad", [context(prompt=(1, 50)), context(prompt=(-1,)), context(outputs=(2, 99))], ids=str)
def test_ids_outside_the_vocabulary_fail_their_request_only(bad: RequestContext) -> None:
    states = RequestStates(SAMPLER, vocab_size=50)
    failed = states.update(ScheduledBatch(1, (scheduled("bad", context=bad), scheduled("good", context=context()))))
    assert list(failed) == ["bad"]
    assert "vocabulary of 50" in failed["bad"]
    assert states.get("bad") is None
    assert states.get("good") is not None


def test_a_request_without_state_is_reported() -> None:
    states = RequestStates(SAMPLER, vocab_size=50)
    assert list(states.update(ScheduledBatch(1, (scheduled("lost"),)))) == ["lost"]


def test_pending_tokens_are_what_was_sampled_here() -> None:
    state = RequestState(context(prompt=(1, 2), outputs=(3,)), GREEDY, SAMPLER)
    state.add_output(4)
    assert state.known_token_ids(scheduled("a", (PENDING_TOKEN_ID,), 3)) == (4,)
    assert state.known_token_ids(scheduled("a", (2, 3, PENDING_TOKEN_ID), 1)) == (2, 3, 4)
    assert state.known_token_ids(scheduled("a", (1, 2), 0)) == (1, 2)
    with pytest.raises(IndexError):
        state.known_token_ids(scheduled("a", (PENDING_TOKEN_ID,), 4))


def test_block_tables_are_converted_when_they_change() -> None:
    state = RequestState(context(), GREEDY, SAMPLER)
    first = state.block_table(0, (3, 4))
    assert first.tolist() == [3, 4]
    assert state.block_table(0, (3, 4)) is first
    assert state.block_table(1, (8,)).tolist() == [8]
    assert state.block_table(0, (0, 4, 9)).tolist() == [0, 4, 9]
