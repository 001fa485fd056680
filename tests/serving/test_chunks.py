"""Chunks made from a frame are those that the structs would make."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pelton.core.output import RequestOutput
from pelton.serving.openai.chunks import AnswerOptions, ChatChunkEncoder, CompletionChunkEncoder
from pelton.serving.openai.logprobs import TokenSpelling
from tests.make import ByteDecoder

NASTY = ['"text":""', '"content":""', "\n\u2028\x00", "é👩‍🚀", "\\"]


@pytest.mark.parametrize("make", [ChatChunkEncoder, CompletionChunkEncoder])
@pytest.mark.parametrize("include_usage", [False, True])
def test_plain_deltas(make: type[ChatChunkEncoder] | type[CompletionChunkEncoder], include_usage: bool) -> None:
    options = AnswerOptions(
        answer_id="a",
        created=7,
        model='m"text":""',
        fingerprint="fp_1",
        prompts=[[1, 2]] if make is ChatChunkEncoder else [[1], [2]],
        n=3,
        spelling=TokenSpelling(ByteDecoder()),
        include_usage=include_usage,
    )
    plain, structs = make(options), make(options)
    structs._is_plain = False
    for prompt_index in range(len(options.prompts)):
        outputs = [RequestOutput("a", index, (index,), text) for text in NASTY for index in range(3)]
        for batch in ([(prompt_index, outputs)], *([(prompt_index, [output])] for output in outputs)):
            assert plain.encode(batch) == structs.encode(batch)
    assert plain.last() == structs.last()
    [event] = plain.encode([(0, [RequestOutput("a", 0, (5,), "hi")])]).split(b"\n\n")[:-1]
    assert json.loads(event.removeprefix(b"data: "))["model"] == options.model


def test_what_more_than_text_is_asked_for_is_told() -> None:
    options = AnswerOptions(
        answer_id="a",
        created=7,
        model="m",
        fingerprint="fp_1",
        prompts=[[1]],
        n=1,
        spelling=TokenSpelling(ByteDecoder()),
    )
    for asked in ({"return_token_ids": True}, {"logprobs": 1}, {"echo_texts": ["p"]}, {"drop_output": True}):
        assert options.is_plain
        assert not replace(options, **asked).is_plain
