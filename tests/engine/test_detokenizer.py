from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pelton.engine.detokenizer import IncrementalDetokenizer, TokenTexts
from tests.make import ByteDecoder

DECODER = ByteDecoder()


def push_all(detokenizer: IncrementalDetokenizer, data: bytes) -> list[str]:
    deltas = []
    for token_id in data:
        deltas.append(detokenizer.push(token_id))
        if detokenizer.matched_stop is not None:
            return deltas
    return [*deltas, detokenizer.flush()]


@given(st.text())
def test_any_text_survives_byte_by_byte(text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    deltas = push_all(IncrementalDetokenizer(TokenTexts(DECODER)), data)
    assert "".join(deltas) == data.decode("utf-8", "replace")


def test_a_character_is_never_split() -> None:
    assert push_all(IncrementalDetokenizer(TokenTexts(DECODER)), "aé👩‍🚀".encode()) == [
        *("a", "", "é", "", "", "", "👩", "", "", "\u200d", "", "", "", "🚀", "")
    ]


def test_an_incomplete_character_at_the_end_is_replaced() -> None:
    assert push_all(IncrementalDetokenizer(TokenTexts(DECODER)), "é".encode()[:1]) == ["", "\ufffd"]


def test_special_tokens_are_left_out_unless_wanted() -> None:
    assert IncrementalDetokenizer(TokenTexts(DECODER)).push(256) == ""
    # The byte decoder has no spelling for 256, so what shows is that the token passes the filter.
    assert not IncrementalDetokenizer(TokenTexts(DECODER), skip_special_tokens=False).push(256)


@given(
    st.text("ab", max_size=40),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.booleans(),
)
def test_stop_strings_across_token_borders(text: str, stops: list[str], include: bool) -> None:
    """The first stop to be completed ends the text; nothing of it or after it was emitted before."""
    detokenizer = IncrementalDetokenizer(TokenTexts(DECODER), stops, include_stop_str_in_output=include)
    emitted = "".join(push_all(detokenizer, text.encode()))
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert detokenizer.matched_stop is None
        assert emitted == text
        return
    start, stop = min((ends[0] - len(stop), stop) for stop in stops if text[: ends[0]].endswith(stop))
    assert detokenizer.matched_stop is not None
    assert len(detokenizer.matched_stop) == len(stop)
    assert emitted == text[: ends[0]] if include else emitted == text[:start]


@pytest.mark.parametrize("stop", ["é", "👩‍🚀", "a\n\nb"])
def test_stop_strings_of_several_bytes(stop: str) -> None:
    detokenizer = IncrementalDetokenizer(TokenTexts(DECODER), [stop])
    assert "".join(push_all(detokenizer, f"xy{stop}z".encode())) == "xy"
    assert detokenizer.matched_stop == stop


def test_text_before_min_tokens_is_not_searched() -> None:
    detokenizer = IncrementalDetokenizer(TokenTexts(DECODER), ["a"])
    assert detokenizer.push(ord("a"), check_stop=False) == "a"
    assert detokenizer.push(ord("a")) == ""
    assert detokenizer.matched_stop == "a"


def test_texts_shared_by_generations_never_split_a_character() -> None:
    """A token whose text is known already still ends a character that was left incomplete."""
    texts = TokenTexts(DECODER)
    for _ in range(2):
        detokenizer = IncrementalDetokenizer(texts)
        assert push_all(detokenizer, b"a\xc3a\xc3\xa9b") == ["a", "", "\ufffda", "", "é", "b", ""]
    assert set(texts.known) == {ord("a"), ord("b")}
    special = IncrementalDetokenizer(texts, skip_special_tokens=False)
    special.push(256)
    assert IncrementalDetokenizer(texts).push(256) == ""
