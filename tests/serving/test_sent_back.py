"""What real clients make of an answer goes back to the server as they write it, and is taken."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from pydantic import BaseModel

from tests.serving.make import MODEL_NAME, RunningServer
from tests.serving.test_messages import client_of as anthropic_client
from tests.serving.test_responses_tools import CALLS, PARAMETERS, THOUGHT
from tests.serving.test_responses_tools import TOOLS as RESPONSE_TOOLS
from tests.serving.test_sessions import client_of

USER: Any = [{"role": "user", "content": "Weather in Oslo?"}]
CHAT_TOOLS: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]
STRICT_TOOLS: Any = [
    {
        "type": "function",
        "name": "get_weather",
        "strict": True,
        "parameters": PARAMETERS | {"additionalProperties": False},
    }
]
MESSAGES = "/v1/messages"


class City(BaseModel):
    city: str


def chat(client: openai.OpenAI, messages: list[Any]) -> Any:
    return client.chat.completions.create(model=MODEL_NAME, messages=messages, tools=CHAT_TOOLS, max_tokens=300)


def test_a_chat_streamed_with_the_client_s_helper(tool_server: RunningServer) -> None:
    tool_server.executor.answer = CALLS["get_weather"]
    client = client_of(tool_server)
    with client.chat.completions.stream(model=MODEL_NAME, messages=USER, tools=CHAT_TOOLS, max_tokens=300) as stream:
        list(stream)
        message: Any = stream.get_final_completion().choices[0].message
    assert message.tool_calls[0].index == 0
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    for said in (message, message.model_dump()):
        assert chat(client, [*USER, said, result]).choices


def test_a_chat_s_deltas_put_together(tool_server: RunningServer) -> None:
    tool_server.executor.answer = CALLS["get_weather"]
    client = client_of(tool_server)
    chunks: Any = client.chat.completions.create(
        model=MODEL_NAME, messages=USER, tools=CHAT_TOOLS, max_tokens=300, stream=True
    )
    call: dict[str, Any] = {}
    for chunk in chunks:
        for delta in chunk.choices[0].delta.tool_calls or ():
            if call:
                call["function"]["arguments"] += delta.function.arguments
            else:
                call = delta.model_dump()
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert chat(client, [*USER, said, {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}]).choices


@pytest.mark.parametrize("answer", [THOUGHT + '{"city": "Oslo"}', CALLS["get_weather"]])
def test_a_response_that_the_client_parsed(tool_server: RunningServer, answer: str) -> None:
    tool_server.executor.answer = answer
    client = client_of(tool_server)
    options: Any = {"tools": STRICT_TOOLS} if "tool_call" in answer else {"text_format": City}
    parsed: Any = client.responses.parse(model=MODEL_NAME, input=USER, **options)
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
        for item in parsed.output
        if item.type == "function_call"
    ]
    assert bool(results) == ("tool_call" in answer)
    for said in (parsed.output, [item.model_dump() for item in parsed.output]):
        again = client.responses.create(
            model=MODEL_NAME, input=[*USER, *said, *results, *USER], tools=RESPONSE_TOOLS, max_output_tokens=8
        )
        assert again.output


def test_the_anthropic_client_runs_tools(tool_server: RunningServer) -> None:
    """It first asks for a conversation that the server holds, and sends all of it once it is told why not."""
    asked = []

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        tool_server.executor.answer = "Sunny."
        return "sunny"

    tool_server.executor.answer = CALLS["get_weather"]
    with anthropic_client(tool_server) as client:
        runner = client.beta.messages.tool_runner(
            model=MODEL_NAME, max_tokens=300, messages=USER, tools=[get_weather], max_iterations=4
        )
        messages = list(runner)
    assert asked == ["Oslo"]
    assert messages[-1].content[0].text == "Sunny."


def test_a_thread_is_refused_in_words_that_the_client_knows(http: httpx2.Client) -> None:
    body = {"messages": USER, "max_tokens": 1, "thread": {"type": "create"}}
    refused = http.post(MESSAGES, json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["details"] == {
        "error_code": "thread_unsupported_request",
        "unsupported": ["thread"],
    }
    other = http.post(MESSAGES, json=body | {"thread": None, "container": "c"})
    assert "details" not in other.json()["error"]
