"""The official client against the real server, engine process and model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio

from tests.system.server import run_server

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]
QUESTION: Any = [{"role": "user", "content": "What is 2 + 2? Answer with one number."}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(default_model_path: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        run_server(default_model_path, "--served-model-name", "m") as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def chat(client: openai.AsyncOpenAI, **options: Any) -> Any:
    return await client.chat.completions.create(
        **({"model": "m", "messages": QUESTION, "temperature": 0, "max_tokens": 24} | options)
    )


async def complete(client: openai.AsyncOpenAI, prompt: Any, **options: Any) -> Any:
    return await client.completions.create(model="m", prompt=prompt, **({"temperature": 0} | options))


async def test_a_sensible_answer_streamed_and_not(client: openai.AsyncOpenAI) -> None:
    answer = await chat(client)
    assert "4" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    parts = [chunk.choices[0].delta.content or "" async for chunk in await chat(client, stream=True)]
    assert "".join(parts) == answer.choices[0].message.content
    http: Any = client.post("../tokenize", body={"messages": QUESTION}, cast_to=object)
    assert (await http)["count"] == answer.usage.prompt_tokens


async def test_n_seed_and_temperature(client: openai.AsyncOpenAI) -> None:
    prompt: Any = [{"role": "user", "content": "Write a random sentence about the sea."}]
    options: dict[str, Any] = {"messages": prompt, "temperature": 1.0, "seed": 3, "n": 4, "max_tokens": 16}
    first, again = await asyncio.gather(chat(client, **options), chat(client, **options))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    alone = await chat(client, **(options | {"n": 1}))
    assert alone.choices[0].message.content == texts[0]


async def test_stop_and_bias(client: openai.AsyncOpenAI) -> None:
    counting = await complete(client, "1, 2, 3, 4,", max_tokens=24, stop=[" 7", "never"])
    assert counting.choices[0].text == " 5, 6,"
    assert counting.choices[0].finish_reason == "stop"
    tokens: Any = await client.post("../tokenize", body={"prompt": " banana"}, cast_to=object)
    (banana,) = tokens["tokens"]
    biased = await complete(client, "1, 2, 3, 4,", max_tokens=3, logit_bias={str(banana): 100})
    assert biased.choices[0].text == " banana" * 3
    allowed = await complete(client, "1, 2,", max_tokens=2, extra_body={"allowed_token_ids": [banana]})
    assert allowed.choices[0].text == " banana" * 2


async def test_logprobs_agree_with_each_other(client: openai.AsyncOpenAI) -> None:
    """A text scored as a prompt gets the logprobs that it was generated with."""
    made = await complete(client, "def fib(n):", max_tokens=12, logprobs=2, extra_body={"return_token_ids": True})
    choice = made.choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    for token, logprob, top in zip(
        choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert logprob == max(top.values()) == top[token] <= 0
    scored = await complete(client, choice.prompt_token_ids + choice.token_ids, max_tokens=0, echo=True, logprobs=2)
    own = scored.choices[0].logprobs
    assert scored.choices[0].text == "def fib(n):" + choice.text
    assert own.tokens[-12:] == choice.logprobs.tokens
    assert own.token_logprobs[-12:] == pytest.approx(choice.logprobs.token_logprobs, abs=1e-3)
    assert own.token_logprobs[0] is None
    answer = await chat(client, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    text = b"".join(bytes(entry.bytes) for entry in content).decode()
    assert text.removesuffix("<|im_end|>") == answer.choices[0].message.content


async def test_the_models_own_limits(client: openai.AsyncOpenAI) -> None:
    card: Any = await client.models.retrieve("m")
    with pytest.raises(openai.BadRequestError) as too_long:
        await complete(client, "word " * (card.max_model_len + 10), max_tokens=1)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as no_token:
        await complete(client, [151_936], max_tokens=1)
    assert no_token.value.param == "prompt"
