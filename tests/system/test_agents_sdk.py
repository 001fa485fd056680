"""The OpenAI Agents SDK drives a loop of three tools over `pelton serve` and the real model.

The small model is led: every step must call a tool, and each tool is offered once the one before it has answered.
What it writes as arguments is its own, and follows from results that it can know from nowhere else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from agents import (
    Agent,
    AsyncOpenAI,
    ModelSettings,
    OpenAIChatCompletionsModel,
    RunContextWrapper,
    Runner,
    StopAtTools,
    function_tool,
    set_tracing_disabled,
)

from tests.system.server import run_server

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]
QUESTION = "Which city does the customer of order 7741 live in, and what is the weather there?"


@dataclass
class Trip:
    calls: list[tuple[str, Any]] = field(default_factory=list)

    def has_called(self, count: int) -> bool:
        return len(self.calls) == count


def after(count: int) -> Any:
    """A tool that is offered after `count` calls."""

    def is_enabled(context: RunContextWrapper[Trip], _: Any) -> bool:
        return context.context.has_called(count)

    return is_enabled


@function_tool(is_enabled=after(0))
def find_order(context: RunContextWrapper[Trip], order_number: int) -> str:
    """Find an order by its number."""
    context.context.calls.append(("find_order", order_number))
    return '{"order_number": 7741, "customer_id": "C-3309"}'


@function_tool(is_enabled=after(1))
def find_customer(context: RunContextWrapper[Trip], customer_id: str) -> str:
    """Find a customer by the customer id."""
    context.context.calls.append(("find_customer", customer_id))
    return '{"customer_id": "C-3309", "city": "Trondheim"}'


@function_tool(is_enabled=after(2))
def get_weather(context: RunContextWrapper[Trip], city: str) -> str:
    """Get the weather of a city."""
    context.context.calls.append(("get_weather", city))
    return f"Rain in {city}."


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def model(default_model_path: Path) -> AsyncIterator[OpenAIChatCompletionsModel]:
    set_tracing_disabled(disabled=True)
    async with (
        run_server(default_model_path, "--served-model-name", "m") as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield OpenAIChatCompletionsModel(model="m", openai_client=client)


def make_agent(model: OpenAIChatCompletionsModel) -> Agent[Trip]:
    return Agent(
        name="clerk",
        instructions="Find things out with the tools.",
        model=model,
        tools=[find_order, find_customer, get_weather],
        model_settings=ModelSettings(temperature=0.0, tool_choice="required", parallel_tool_calls=False, max_tokens=96),
        tool_use_behavior=StopAtTools(stop_at_tool_names=["get_weather"]),
        reset_tool_choice=False,
    )


async def test_three_tools_in_a_loop(model: OpenAIChatCompletionsModel) -> None:
    trip = Trip()
    result = await Runner.run(make_agent(model), QUESTION, context=trip, max_turns=5)
    assert trip.calls == [("find_order", 7741), ("find_customer", "C-3309"), ("get_weather", "Trondheim")]
    assert result.final_output == "Rain in Trondheim."


async def test_the_same_loop_streamed(model: OpenAIChatCompletionsModel) -> None:
    trip = Trip()
    result = Runner.run_streamed(make_agent(model), QUESTION, context=trip, max_turns=5)
    kinds = [event.item.type async for event in result.stream_events() if event.type == "run_item_stream_event"]
    assert kinds == ["tool_call_item", "tool_call_output_item"] * 3
    assert trip.calls[-1] == ("get_weather", "Trondheim")
    assert result.final_output == "Rain in Trondheim."
