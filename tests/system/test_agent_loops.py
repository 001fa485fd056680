"""Agents of others against `pelton serve` and the real model: three tools, one after the other."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import agents
import anthropic
import openai
import pytest
import pytest_asyncio
from openai.types.shared import Reasoning

from tests.system.server import Server, run_server

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]

TASK = (
    "Do these three steps, one tool call at a time: 1. get the temperature of Oslo, 2. convert it to Fahrenheit, "
    "3. send the result to Anna."
)
NAMES = ["get_temperature", "to_fahrenheit", "send_message"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(default_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    data_dir = tmp_path_factory.mktemp("data")
    async with run_server(default_model_path, "--served-model-name", "m", "--data-dir", str(data_dir)) as server:
        yield server


def schema(**properties: str) -> dict[str, Any]:
    kinds = {name: {"type": kind} for name, kind in properties.items()}
    return {"type": "object", "properties": kinds, "required": list(properties), "additionalProperties": False}


ANTHROPIC_TOOLS: Any = [
    {
        "name": "get_temperature",
        "description": "Get the temperature of a city in degrees Celsius.",
        "input_schema": schema(city="string"),
    },
    {
        "name": "to_fahrenheit",
        "description": "Convert degrees Celsius to degrees Fahrenheit.",
        "input_schema": schema(celsius="number"),
    },
    {
        "name": "send_message",
        "description": "Send a text message to a person.",
        "input_schema": schema(to="string", text="string"),
    },
]


def call_tool(name: str, input: dict[str, Any]) -> str:
    if name == "get_temperature":
        assert "Oslo" in input["city"]
        return "20"
    return str(float(input["celsius"]) * 9 / 5 + 32) if name == "to_fahrenheit" else "sent"


@pytest.mark.parametrize("streams", [False, True])
async def test_anthropic_client(server: Server, streams: bool) -> None:
    called: list[str] = []
    messages: Any = [{"role": "user", "content": TASK}]
    num_cached = 0
    async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        while len(called) < 3:
            options: Any = {"model": "m", "max_tokens": 200, "messages": messages, "tools": ANTHROPIC_TOOLS}
            options["extra_body"] = {"temperature": 0}
            if streams:
                async with client.messages.stream(**options) as stream:
                    message: Any = await stream.get_final_message()
            else:
                message = await client.messages.create(**options)
            assert message.stop_reason == "tool_use"
            calls = [block for block in message.content if block.type == "tool_use"]
            called += [call.name for call in calls]
            results = [
                {"type": "tool_result", "tool_use_id": call.id, "content": call_tool(call.name, call.input)}
                for call in calls
            ]
            messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
            assert message.usage.cache_read_input_tokens >= num_cached
            num_cached = message.usage.cache_read_input_tokens
        assert called == NAMES
        assert num_cached > 0
        last = await client.messages.create(
            model="m", max_tokens=60, messages=messages, tools=ANTHROPIC_TOOLS, tool_choice={"type": "none"}
        )
        assert last.content[0].type == "text"
    await server.wait_idle()


def make_agent(client: openai.AsyncOpenAI, called: list[tuple[str, Any]]) -> agents.Agent[Any]:
    @agents.function_tool
    def get_temperature(city: str) -> float:
        """Get the temperature of a city in degrees Celsius."""
        called.append(("get_temperature", city))
        return 20

    @agents.function_tool
    def to_fahrenheit(celsius: float) -> float:
        """Convert degrees Celsius to degrees Fahrenheit."""
        called.append(("to_fahrenheit", celsius))
        return celsius * 9 / 5 + 32

    @agents.function_tool
    def send_message(to: str, text: str) -> str:
        """Send a text message to a person."""
        called.append(("send_message", to))
        return f"sent to {to}: {text}"

    return agents.Agent(
        name="helper",
        model=agents.OpenAIResponsesModel(model="m", openai_client=client),
        model_settings=agents.ModelSettings(
            temperature=0.0, max_tokens=200, tool_choice="required", parallel_tool_calls=False
        ),
        reset_tool_choice=False,
        tools=[get_temperature, to_fahrenheit, send_message],
        tool_use_behavior=agents.StopAtTools(stop_at_tool_names=["send_message"]),
    )


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("is_chained", [False, True])
async def test_agents_sdk(server: Server, streams: bool, is_chained: bool) -> None:
    """Its model class for /v1/responses, sending all items each time or naming the response before."""
    agents.set_tracing_disabled(True)
    called: list[tuple[str, Any]] = []
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        agent = make_agent(client, called)
        options: Any = {"max_turns": 6, "auto_previous_response_id": is_chained}
        if streams:
            streamed = agents.Runner.run_streamed(agent, TASK, **options)
            kinds = [event.type async for event in streamed.stream_events()]
            assert "raw_response_event" in kinds
            result: Any = streamed
        else:
            result = await agents.Runner.run(agent, TASK, **options)
        assert called == [("get_temperature", "Oslo"), ("to_fahrenheit", 20), ("send_message", "Anna")]
        assert result.final_output.startswith("sent to Anna")
        assert len(result.raw_responses) == 3
        stored = await client.responses.retrieve(result.last_response_id)
        assert json.loads(stored.output[-1].arguments)["to"] == "Anna"  # type: ignore[union-attr]
        assert (stored.previous_response_id is not None) == is_chained
    await server.wait_idle()


async def test_a_json_schema_holds(server: Server) -> None:
    shape = schema(city="string", country="string", population="integer")
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        format: Any = {"type": "json_schema", "name": "city", "schema": shape, "strict": True}
        response = await client.responses.create(
            model="m", input="Tell me about Oslo.", text={"format": format}, max_output_tokens=100, temperature=0
        )
        city = json.loads(response.output_text)
        assert set(city) == set(shape["properties"])
        assert isinstance(city["population"], int)
        with pytest.raises(openai.BadRequestError) as refused:
            await client.responses.create(model="m", input="hi", reasoning=Reasoning(effort="high"))
        assert refused.value.param == "reasoning.effort"
        format["schema"] = {"type": "object", "properties": {"a": {"type": "strong"}}}
        with pytest.raises(openai.BadRequestError) as invalid:
            await client.responses.create(model="m", input="hi", text={"format": format})
        assert str(invalid.value.param).startswith("text.format")
    async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as other:
        config: Any = {"format": {"type": "json_schema", "schema": shape}}
        message: Any = await other.messages.create(
            model="m",
            max_tokens=100,
            extra_body={"temperature": 0},  # drawn numbers may have too many digits to end
            messages=[{"role": "user", "content": "Tell me about Oslo."}],
            output_config=config,
        )
        assert set(json.loads(message.content[0].text)) == set(shape["properties"])
    await server.wait_idle()
