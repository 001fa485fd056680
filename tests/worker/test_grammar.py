"""Matchers beside the requests' states, and the masks of a step."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pelton.core.batch import RequestContext, ScheduledBatch, ScheduledRequest
from pelton.core.grammar import Grammar, GrammarKind
from pelton.core.sampling_params import SamplingParams
from pelton.weights.tokenizer.grammar import GrammarError
from pelton.worker.request_state import RequestState, RequestStates
from pelton.worker.sampling.grammar import GrammarMasks, GrammarMatchers
from pelton.worker.sampling.reference import ReferenceSampler
from tests.make import EOS_TOKEN_ID, VOCAB_SIZE, ByteDecoder

NUMBER = Grammar(kind=GrammarKind.REGEX, source="[0-9]{3}")
LETTERS = Grammar(kind=GrammarKind.REGEX, source="a+")


def states_of(
    *samplings: SamplingParams, outputs: tuple[int, ...] = (), matchers: GrammarMatchers | None = None
) -> list[RequestState]:
    sampler = ReferenceSampler(VOCAB_SIZE, {EOS_TOKEN_ID})
    states = RequestStates(sampler, VOCAB_SIZE, matchers or GrammarMatchers(ByteDecoder(), VOCAB_SIZE))
    scheduled = tuple(
        ScheduledRequest(str(i), (1,), 0, ((1,),), sampling, True, context=RequestContext((1,), outputs, 0))
        for i, sampling in enumerate(samplings)
    )
    assert states.update(ScheduledBatch(1, scheduled)) == {}
    found = [states.get(str(i)) for i in range(len(samplings))]
    return [state for state in found if state is not None]


def fill(states: list[RequestState]) -> list[set[int] | None]:
    """The allowed tokens of each row."""
    masks = GrammarMasks(VOCAB_SIZE, {EOS_TOKEN_ID}).fill([state.grammar for state in states])
    bits = [None if mask is None else np.unpackbits(mask.view(np.uint8), bitorder="little") for mask in masks]
    return [None if row is None else set(np.flatnonzero(row).tolist()) for row in bits]


def params(grammar: Grammar | None, **settings: object) -> SamplingParams:
    return SamplingParams(grammar=grammar, **settings)  # type: ignore[arg-type]


def test_rows_with_and_without_a_grammar() -> None:
    states = states_of(params(NUMBER), params(None), params(LETTERS))
    assert fill(states) == [set(b"0123456789"), None, set(b"a")]
    for state, token_id in zip(states, b"7xa", strict=True):
        state.add_output(token_id)
    assert fill(states) == [set(b"0123456789"), None, {*b"a", EOS_TOKEN_ID}]
    assert GrammarMasks(VOCAB_SIZE, ()).start([None, None]) is None


def test_the_end_is_told_with_the_last_token_and_what_comes_after_it_changes_nothing() -> None:
    (state,) = states_of(params(NUMBER))
    assert state.grammar is not None
    ends = []
    for token_id in b"123":
        fill([state])
        state.add_output(token_id)
        ends.append(state.grammar.is_complete)
    assert ends == [False, False, True]
    assert fill([state]) == [{EOS_TOKEN_ID}]
    for token_id in (EOS_TOKEN_ID, 9):  # computed in vain by a step in flight
        state.add_output(token_id)
        assert fill([state]) == [{EOS_TOKEN_ID}]
    assert state.grammar.problem is None


def test_a_context_brings_a_request_to_where_it_was() -> None:
    (state,) = states_of(params(NUMBER), outputs=tuple(b"12"))
    assert fill([state]) == [set(b"0123456789")]
    state.add_output(ord("3"))
    assert state.grammar is not None
    assert state.grammar.is_complete
    (lost,) = states_of(params(NUMBER), outputs=tuple(b"1x"))
    assert fill([lost]) == [set()]
    assert lost.grammar is not None
    assert "do not follow" in (lost.grammar.problem or "")


def test_ignore_eos_and_min_tokens() -> None:
    endless, short = states_of(params(LETTERS, ignore_eos=True), params(NUMBER, min_tokens=5))
    for token_id in b"aaa":
        assert fill([endless]) == [set(b"a")]
        endless.add_output(token_id)
    assert endless.grammar is not None
    assert not endless.grammar.is_complete
    for token_id in b"123":
        fill([short])
        short.add_output(token_id)
    # The sampler bans the end until min_tokens, so nothing is left: an error of this request alone.
    assert short.grammar is not None
    assert not short.grammar.is_complete
    assert fill([short]) == [{EOS_TOKEN_ID}]


def test_text_before_the_marker_is_free_and_its_mask_is_computed_once() -> None:
    grammar = Grammar(kind=GrammarKind.REGEX, source="[0-9]{3}", starts_after="</t>")
    (state,) = states_of(params(grammar))
    (first,) = fill([state])
    assert first is not None
    assert {*b"az<\n"} < first
    assert EOS_TOKEN_ID not in first
    assert state.grammar is not None
    assert state.grammar.free_text is not None
    computed = state.grammar.free_text.mask
    for token_id in "é <b> </ </t".encode():
        state.add_output(token_id)
        (allowed,) = fill([state])
        assert allowed is not None
        is_mid_character = token_id == "é".encode()[0]
        assert (allowed == first) == (not is_mid_character)
    assert state.grammar.free_text.mask is computed
    state.add_output(ord(">"))
    assert fill([state]) == [set(b"0123456789")]


def test_a_grammar_that_does_not_compile_costs_its_own_request() -> None:
    bad = Grammar(kind=GrammarKind.REGEX, source="((")
    states = states_of(params(bad), params(NUMBER))
    assert fill(states) == [set(), set(b"0123456789")]
    assert states[0].grammar is not None
    assert "unclosed group" in (states[0].grammar.problem or "")
    with pytest.raises(GrammarError):
        GrammarMatchers(ByteDecoder(), VOCAB_SIZE).prepare(bad).result(10)


def test_a_request_that_meets_a_limit_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matchers of one grammar share a lexer, and one of them may bring it to the limit of its states."""
    monkeypatch.setattr("pelton.weights.tokenizer.grammar._MAX_LEXER_STATES", 300)
    wild = params(Grammar(kind=GrammarKind.REGEX, source="[ab]*a[ab]{12}"))
    matchers = GrammarMatchers(ByteDecoder(), VOCAB_SIZE)
    hungry, modest = states_of(wild, wild, matchers=matchers)
    modest.add_output(ord("a"))
    source = random.Random(1)
    for _ in range(600):
        allowed, beside = fill([hungry, modest])
        assert beside == set(b"ab")
        if not allowed:
            break
        hungry.add_output(source.choice(b"ab"))
    assert hungry.grammar is not None
    assert "too many states" in (hungry.grammar.problem or "")
    (new,) = states_of(wild, outputs=tuple(b"ab"), matchers=matchers)
    for token_id in b"ab" * 4:
        for state in (modest, new):
            assert fill([state]) == [set(b"ab")]
            state.add_output(token_id)


def test_without_sharing_a_request_meets_a_limit_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal requests on several ranks all have to, whatever ran there before and however fast it was."""
    monkeypatch.setattr("pelton.weights.tokenizer.grammar._MAX_LEXER_STATES", 40)
    wild = params(Grammar(kind=GrammarKind.REGEX, source="[ab]*a[ab]{12}"))
    matchers = GrammarMatchers(ByteDecoder(), VOCAB_SIZE, shares=False)
    ends = []
    for _ in range(2):
        (hungry,) = states_of(wild, matchers=matchers)
        num_tokens = 0
        while fill([hungry]) != [set()] and num_tokens < 300:
            hungry.add_output(ord("a"))
            num_tokens += 1
        assert hungry.grammar is not None
        assert "too many states" in (hungry.grammar.problem or "")
        ends.append(num_tokens)
    assert ends[0] == ends[1]


def test_a_grammar_that_is_slow_to_compile_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pelton.weights.tokenizer.grammar._MAX_LEXER_STATES", 40)
    monkeypatch.setattr("pelton.worker.sampling.grammar._MAX_AGAIN_S", 0.0)
    hungry, modest = states_of(*[params(Grammar(kind=GrammarKind.REGEX, source="[ab]*a[ab]{12}"))] * 2)
    fill([modest])
    while fill([hungry]) != [set()]:
        hungry.add_output(ord("a"))
    assert fill([modest]) == [set()]
    assert modest.grammar is not None
    assert "too many states" in (modest.grammar.problem or "")


def test_what_is_kept_is_bounded_by_number_and_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pelton.worker.sampling.grammar._MAX_KEPT", 5)
    monkeypatch.setattr("pelton.worker.sampling.grammar._MAX_KEPT_BYTES", 1000)
    matchers = GrammarMatchers(ByteDecoder(), VOCAB_SIZE)
    for size, num_kept in ((3, 5), (300, 3), (2000, 1)):
        for index in range(8):
            source = f"a{{{index}}}".ljust(size, "b")
            matchers.prepare(Grammar(kind=GrammarKind.REGEX, source=source)).result(10)
        assert len(matchers._kept) == num_kept
        assert matchers._num_kept_bytes == sum(len(grammar.source) for grammar in matchers._kept)
    matchers.prepare(NUMBER).result(10)
    assert list(matchers._kept) == [NUMBER]


def test_the_lexers_that_have_grown_most_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    matchers = GrammarMatchers(ByteDecoder(), VOCAB_SIZE)
    number, letters = states_of(params(NUMBER), params(LETTERS), matchers=matchers)
    for _ in range(50):
        fill([number])
    fill([letters])
    spent = {grammar: kept.result().mask_s for grammar, kept in matchers._kept.items()}
    assert spent[NUMBER] > spent[LETTERS] > 0
    monkeypatch.setattr("pelton.worker.sampling.grammar._MAX_KEPT_MASK_S", spent[NUMBER])
    other = Grammar(kind=GrammarKind.REGEX, source="b")
    matchers.prepare(other).result(10)
    assert list(matchers._kept) == [LETTERS, other]
    # Who runs with it goes on, and who comes gets a new one.
    number.add_output(ord("1"))
    (new,) = states_of(params(NUMBER), matchers=matchers)
    assert fill([number, new]) == [set(b"0123456789")] * 2


def test_without_a_vocabulary_a_grammar_fails() -> None:
    states = RequestStates(ReferenceSampler(VOCAB_SIZE, ()), VOCAB_SIZE)
    request = ScheduledRequest("a", (1,), 0, ((1,),), params(NUMBER), True, context=RequestContext((1,), (), 0))
    assert "no vocabulary" in states.update(ScheduledBatch(1, (request,)))["a"]
