"""Structured output of the real model: alone and in company, streamed, sampled, preempted."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import pytest_asyncio

from pelton import LLM, Grammar, GrammarKind, SamplingParams
from pelton.core.errors import EngineStepError, InvalidRequestError
from pelton.core.request import FinishReason
from tests.system.server import run_server

pytestmark = pytest.mark.model

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["new", "old"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PERSON = Grammar(kind=GrammarKind.JSON_SCHEMA, source=json.dumps(SCHEMA))
QUESTION: Any = [{"role": "user", "content": "Describe a person as JSON."}]


@pytest.fixture(scope="module")
def llm(default_model_path: Path) -> Iterator[LLM]:
    with LLM(str(default_model_path), max_model_len=256, max_num_seqs=8) as llm:
        yield llm


def constrained(grammar: Grammar, **settings: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0, "max_tokens": 80, "grammar": grammar} | settings))


def test_every_sequence_validates(llm: LLM) -> None:
    sampling = constrained(PERSON, temperature=1.5, n=4, seed=3, logprobs=1, repetition_penalty=1.1)
    (answer,) = llm.chat(QUESTION, sampling)
    assert len({sequence.text for sequence in answer.sequences}) > 1
    for sequence in answer.sequences:
        assert sequence.finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(sequence.text), SCHEMA)
        assert sequence.logprobs is not None
        assert [entry.token_id for entry in sequence.logprobs] == sequence.token_ids


def test_in_chunks_in_company_and_preempted_it_is_the_same_answer(llm: LLM, default_model_path: Path) -> None:
    prompts = [[{"role": "user", "content": f"Describe person number {i} as JSON."}] for i in range(6)]
    mixed = [constrained(PERSON) if i % 2 == 0 else SamplingParams(temperature=0, max_tokens=40) for i in range(6)]
    alone = [llm.chat(prompt, sampling)[0].text for prompt, sampling in zip(prompts, mixed, strict=True)]
    settings = {"max_model_len": 128, "max_num_seqs": 8, "num_kv_blocks": 15, "long_prefill_chunk": 16}
    with LLM(str(default_model_path), enable_prefix_caching=False, host_kv_cache_gb=0, **settings) as crowded:
        together = crowded.chat(prompts, mixed)
        assert crowded.stats.num_preemptions_total > 0
    assert [answer.text for answer in together] == alone


@pytest.mark.parametrize(
    ("grammar", "good"),
    [
        (Grammar(kind=GrammarKind.CHOICE, source='["red apple", "blue sky"]'), ("red apple", "blue sky")),
        (Grammar(kind=GrammarKind.LARK, source='root ::= "x" | "yy"'), ("x", "yy")),
        (Grammar(kind=GrammarKind.REGEX, source="[0-9]{4}-[0-9]{2}", starts_after="```"), None),
    ],
)
def test_other_kinds(llm: LLM, grammar: Grammar, good: tuple[str, ...] | None) -> None:
    (answer,) = llm.chat(QUESTION, constrained(grammar))
    assert answer.sequences[0].finish_reason is FinishReason.STOP
    if good is not None:
        assert answer.text in good
    else:
        free, _, number = answer.text.partition("```")
        assert len(number) == 7, (free, number)


def test_settings_that_leave_nothing_cost_their_own_request(llm: LLM) -> None:
    number = Grammar(kind=GrammarKind.REGEX, source="[0-9]{3}")
    with pytest.raises(EngineStepError, match="no token is left"):
        llm.chat(QUESTION, constrained(number, min_tokens=20))
    bad = Grammar(kind=GrammarKind.JSON_SCHEMA, source='{"items": {"uniqueItems": true}}')
    with pytest.raises(InvalidRequestError, match="at #/items/uniqueItems"):
        llm.chat(QUESTION, constrained(bad))
    with pytest.raises(InvalidRequestError, match="missing"):
        llm.chat(QUESTION, constrained(Grammar(kind=GrammarKind.LARK, source="start: missing")))
    # The grammar ends an answer that may not end by itself, a stop string one that could go on.
    assert llm.chat(QUESTION, constrained(number, ignore_eos=True))[0].sequences[0].finish_reason is FinishReason.STOP
    stopped = llm.chat(QUESTION, constrained(PERSON, stop=(",",)))[0].sequences[0]
    assert stopped.stop_reason == ","


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(default_model_path: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        run_server(default_model_path, "--served-model-name", "m", "--max-model-len", "256") as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.mark.asyncio(loop_scope="module")
async def test_over_http_streamed_and_not(client: openai.AsyncOpenAI) -> None:
    options: Any = {
        "model": "m",
        "messages": QUESTION,
        "temperature": 0,
        "max_tokens": 80,
        "response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA, "strict": True}},
    }
    answer = await client.chat.completions.create(**options)
    text = answer.choices[0].message.content or ""
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(text), SCHEMA)
    stream = await client.chat.completions.create(**options, stream=True)
    parts = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    assert "".join(parts) == text
    bad = {"type": "object", "properties": {"a": {"contains": {}}}}
    format_ = {"type": "json_schema", "json_schema": {"name": "p", "schema": bad}}
    with pytest.raises(openai.BadRequestError, match="#/properties/a/contains"):
        await client.chat.completions.create(**(options | {"response_format": format_}))
