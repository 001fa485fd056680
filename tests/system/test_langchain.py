"""LangChain's OpenAI classes against `pelton serve` and the real model: both APIs, tools, formats, embeddings."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
import pytest_asyncio
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field, SecretStr

from tests.system.server import Server, run_server

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]
both_apis = pytest.mark.parametrize("use_responses_api", [False, True])
MESSAGES = [SystemMessage("You are brief."), HumanMessage("What is the capital of France? One word.")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(default_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    data_dir = str(tmp_path_factory.mktemp("data"))
    async with run_server(default_model_path, "--served-model-name", "m", "--data-dir", data_dir) as server:
        yield server


def chat(server: Server, **options: Any) -> ChatOpenAI:
    values: dict[str, Any] = {"model": "m", "temperature": 0, "max_tokens": 120, "max_retries": 0} | options
    return ChatOpenAI(base_url=f"{server.url}/v1", api_key=SecretStr("none"), **values)


class City(BaseModel):
    """A city."""

    name: str = Field(description="Its name")
    country: str = Field(description="The country that it is in")
    size: Literal["small", "large"]


@tool
def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return f"Rain in {city}."


@both_apis
async def test_invoke_and_stream_say_the_same(server: Server, use_responses_api: bool) -> None:
    model = chat(server, use_responses_api=use_responses_api, stream_usage=True)
    answer = await model.ainvoke(MESSAGES)
    assert "Paris" in answer.text
    chunks = [chunk async for chunk in model.astream(MESSAGES)]
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.text == answer.text
    assert len(chunks) > 2
    for message in (answer, whole):
        assert message.usage_metadata is not None
        assert message.usage_metadata["total_tokens"] > message.usage_metadata["output_tokens"] > 0
        assert message.response_metadata["model_name"] == "m"
    if not use_responses_api:
        assert answer.response_metadata["system_fingerprint"].startswith("fp_")
        assert whole.response_metadata["finish_reason"] == answer.response_metadata["finish_reason"] == "stop"


@both_apis
async def test_a_tool_is_called_and_answered(server: Server, use_responses_api: bool) -> None:
    model = chat(server, use_responses_api=use_responses_api)
    bound = model.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False)
    question = HumanMessage("What is the weather in Bergen?")
    called = await bound.ainvoke([question])
    assert isinstance(called, AIMessage)
    (call,) = called.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Bergen"})
    streamed = [chunk async for chunk in bound.astream([question])]
    whole = streamed[0]
    for chunk in streamed[1:]:
        whole += chunk
    assert [(found["name"], found["args"]) for found in whole.tool_calls] == [(call["name"], call["args"])]  # type: ignore[attr-defined]
    # What LangChain made of the answer goes back: its messages, and on the other API its items.
    for said in (called, whole):
        result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=said.tool_calls[0]["id"])  # type: ignore[attr-defined]
        answer = await model.bind_tools([get_weather], tool_choice="none").ainvoke([question, said, result])
        assert "rain" in answer.text.lower()


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@both_apis
async def test_an_answer_of_a_shape(server: Server, use_responses_api: bool, method: Any) -> None:
    model = chat(server, use_responses_api=use_responses_api, temperature=1, seed=3)
    if use_responses_api:
        model = chat(server, use_responses_api=True, temperature=1)
    asking = model.with_structured_output(City, method=method, strict=True)
    found = await asking.ainvoke("Tell me about the city of Lyon.")
    assert isinstance(found, City)
    answers = await model.with_structured_output(City, method=method).abatch(["Paris", "Oslo", "Rome", "Cairo"])
    assert all(isinstance(answer, City) for answer in answers)


async def test_a_conversation_that_the_server_keeps(server: Server) -> None:
    model = chat(server, use_responses_api=True, use_previous_response_id=True)
    first = await model.ainvoke([HumanMessage("My name is Zofia. Say hello.")])
    second = await model.ainvoke(
        [HumanMessage("My name is Zofia. Say hello."), first, HumanMessage("What is my name?")]
    )
    assert "Zofia" in second.text


async def test_several_answers_logprobs_and_errors(server: Server) -> None:
    model = chat(server, logprobs=True, top_logprobs=2, max_tokens=5)
    answer = await model.ainvoke(MESSAGES)
    assert all(len(entry["top_logprobs"]) == 2 for entry in answer.response_metadata["logprobs"]["content"])
    result = await chat(server, n=3, temperature=1, max_tokens=4).agenerate([MESSAGES])
    assert len(result.generations[0]) == 3
    with pytest.raises(openai.NotFoundError):
        await chat(server, model="other").ainvoke("hi")
    with pytest.raises(openai.BadRequestError):
        await chat(server, top_p=7).ainvoke("hi")


async def test_embeddings(server: Server) -> None:
    # LangChain would cut texts by another tokenizer, which it fetches from the network.
    options: dict[str, Any] = {"model": "m", "check_embedding_ctx_length": False, "max_retries": 0}
    embeddings = OpenAIEmbeddings(base_url=f"{server.url}/v1", api_key=SecretStr("none"), **options)
    vectors = await embeddings.aembed_documents(["a cat", "a kitten", "tax law"])
    assert [len(vector) for vector in vectors] == [896] * 3
    assert await embeddings.aembed_query("a cat") == vectors[0]
    short = OpenAIEmbeddings(base_url=f"{server.url}/v1", api_key=SecretStr("none"), dimensions=64, **options)
    assert len(await short.aembed_query("a cat")) == 64
