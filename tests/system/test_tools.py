"""Tools and reasoning on the real model: calls that are enforced, sampled hot, and a budget that ends thinking."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import pytest_asyncio

from tests.system.server import run_server

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 2, "maxLength": 30},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
        "hours": {"type": "array", "items": {"$ref": "#/$defs/hour"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["city", "unit", "days", "hours"],
    "additionalProperties": False,
    "$defs": {"hour": {"type": "string", "pattern": "^[0-2][0-9]:00$"}},
}
FORECAST: Any = {"type": "function", "function": {"name": "get_forecast", "parameters": SCHEMA}}
NOTE: Any = {"type": "function", "function": {"name": "take_note", "parameters": {"properties": {"n": {"const": 4}}}}}
USER: Any = [{"role": "user", "content": "How is the weather in Oslo at noon and in the evening?"}]
THINKING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}{# </think> #}"
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(default_model_path: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        run_server(default_model_path, "--served-model-name", "m") as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_forecast"}}])
async def test_calls_that_must_come_follow_their_schema(
    client: openai.AsyncOpenAI, choice: Any, temperature: float
) -> None:
    options: Any = {"tools": [FORECAST, NOTE], "tool_choice": choice, "parallel_tool_calls": False}
    options |= {"temperature": temperature, "seed": 5, "n": 4 if temperature else 1, "max_tokens": 160}
    answer = await client.chat.completions.create(model="m", messages=USER, **options)
    for found in answer.choices:
        assert found.finish_reason == ("tool_calls" if choice == "required" else "stop")
        assert found.message.content is None
        (call,) = found.message.tool_calls
        if call.function.name == "get_forecast":
            jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
        else:
            assert choice == "required"


async def test_a_strict_tool_is_held_to_its_schema_where_the_model_chooses(client: openai.AsyncOpenAI) -> None:
    strict: Any = {"type": "function", "function": {**FORECAST["function"], "strict": True}}
    options: Any = {"tools": [strict], "temperature": 0, "max_tokens": 160}
    plain: Any = [{"role": "user", "content": "Get the forecast for Oslo for 3 days."}]
    answer = await client.chat.completions.create(model="m", messages=plain, **options)
    (call,) = answer.choices[0].message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    hello: Any = [{"role": "user", "content": "Who are you? Answer in one sentence."}]
    free = await client.chat.completions.create(model="m", messages=hello, **options)
    assert free.choices[0].message.tool_calls is None
    assert "Qwen" in free.choices[0].message.content


async def test_a_format_of_the_answer_goes_together_with_tools(client: openai.AsyncOpenAI) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}}, "required": ["name"]}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "who", "schema": schema}}
    hello: Any = [{"role": "user", "content": "Who are you?"}]
    options: Any = {"tools": [FORECAST], "temperature": 0, "max_tokens": 160, "response_format": wanted}
    answer = await client.chat.completions.create(model="m", messages=hello, **options)
    message = answer.choices[0].message
    if message.tool_calls is None:
        jsonschema.validate(json.loads(message.content), schema)
    else:
        jsonschema.validate(json.loads(message.tool_calls[0].function.arguments), {"type": "object"})


async def test_a_schema_that_cannot_be_enforced_is_refused_with_its_place(client: openai.AsyncOpenAI) -> None:
    tool = {"function": {"name": "f", "parameters": {"properties": {"x": {"type": "array", "uniqueItems": True}}}}}
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(
            model="m", messages=USER, tools=[NOTE, {"type": "function", **tool}], tool_choice="required"
        )
    assert refused.value.param == "tools[1].function.parameters"
    assert "#/properties/x" in str(refused.value)


async def test_a_budget_ends_thinking(default_model_path: Path, tmp_path: Path) -> None:
    template = tmp_path / "thinking.jinja"
    template.write_text(THINKING_TEMPLATE)
    async with (
        run_server(default_model_path, "--served-model-name", "m", "--chat-template", str(template)) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        question: Any = [{"role": "user", "content": "What is 2 + 2?"}]

        async def ask(**options: Any) -> Any:
            return await client.chat.completions.create(
                model="m", messages=question, temperature=0, max_tokens=48, **options
            )

        held, hinted, other = await asyncio.gather(
            ask(extra_body={"thinking_budget": 6}), ask(reasoning_effort="none"), ask(tool_choice="none")
        )
        message = held.choices[0].message
        num_forced = held.usage.completion_tokens_details.reasoning_tokens - 6
        assert 1 <= num_forced <= 4  # the marker's tokens
        assert message.reasoning_content
        assert message.content
        assert hinted.usage.completion_tokens_details.reasoning_tokens == num_forced
        assert hinted.choices[0].message.reasoning_content is None
        assert other.choices[0].message.reasoning_content
