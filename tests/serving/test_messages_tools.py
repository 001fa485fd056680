"""Tools and thinking through /v1/messages, with a model whose words are given."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

from tests.serving.make import MODEL_NAME, RunningServer
from tests.serving.test_messages import client_of
from tests.serving.test_responses import prompt_of
from tests.serving.test_responses_tools import CALLS, PARAMETERS, THOUGHT

TOOLS: Any = [{"name": name, "description": name, "input_schema": PARAMETERS} for name in ("get_weather", "get_time")]
HI: Any = [{"role": "user", "content": "Weather in Oslo?"}]


def ask(server: RunningServer, answer: str, **options: Any) -> Any:
    server.executor.answer = answer
    with client_of(server) as client:
        return client.messages.create(
            **({"model": MODEL_NAME, "max_tokens": 500, "messages": HI, "tools": TOOLS} | options)
        )


def shapes(message: Any) -> list[tuple[Any, ...]]:
    names = {"text": ("text",), "thinking": ("thinking",), "tool_use": ("name", "input")}
    return [(block.type, *(getattr(block, name) for name in names[block.type])) for block in message.content]


CALLED = [("tool_use", name, {"city": "Oslo"}) for name in ("get_weather", "get_time")]
ANSWERS: list[tuple[str, list[tuple[Any, ...]], str]] = [
    (CALLS["get_weather"], CALLED[:1], "tool_use"),
    ("\n".join(CALLS.values()), CALLED, "tool_use"),
    (f"I look.\n{CALLS['get_weather']}", [("text", "I look."), CALLED[0]], "tool_use"),
    (
        f"{THOUGHT}So:\n{CALLS['get_time']}",
        [("thinking", "Let me see."), ("text", "So:"), CALLED[1]],
        "tool_use",
    ),
    (f"{THOUGHT}Sunny.", [("thinking", "Let me see."), ("text", "Sunny.")], "end_turn"),
    ("", [], "end_turn"),
]


@pytest.mark.parametrize(("answer", "expected", "stop_reason"), ANSWERS)
def test_streamed_and_not_agree(
    tool_server: RunningServer, answer: str, expected: list[tuple[Any, ...]], stop_reason: str
) -> None:
    whole = ask(tool_server, answer)
    assert (shapes(whole), whole.stop_reason) == (expected, stop_reason)
    with client_of(tool_server).messages.stream(model=MODEL_NAME, max_tokens=500, messages=HI, tools=TOOLS) as stream:
        events = list(stream)
        streamed = stream.get_final_message()
    assert (shapes(streamed), streamed.stop_reason) == (expected, stop_reason)
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    starts = [event.index for event in events if event.type == "content_block_start"]
    stops = [event.index for event in events if event.type == "content_block_stop"]
    assert starts == stops == list(range(len(expected)))
    for block in (*whole.content, *streamed.content):
        assert block.type != "tool_use" or block.id.startswith("toolu_")
        assert block.type != "thinking" or block.signature


def test_a_call_that_is_cut_off(tool_server: RunningServer) -> None:
    message = ask(tool_server, CALLS["get_weather"], max_tokens=60)
    assert message.stop_reason == "max_tokens"
    assert list(message.content[0].input) == ["INVALID_JSON"]


def test_a_loop_of_calls(tool_server: RunningServer) -> None:
    first = ask(tool_server, THOUGHT + "\n".join(CALLS.values()))
    calls = [block for block in first.content if block.type == "tool_use"]
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": call.name} for call in calls]
    messages = [*HI, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    second = ask(tool_server, "Done.", messages=messages)
    assert second.content[0].text == "Done."
    prompt = prompt_of(tool_server, second.id)
    assert prompt.endswith(
        '<tool_call>{"city": "Oslo"}</tool_call><tool_call>{"city": "Oslo"}</tool_call><|end|>'
        "<|start|>tool\nget_weather<|end|><|start|>tool\nget_time<|end|><|start|>assistant\n"
    )
    with pytest.raises(anthropic.BadRequestError, match="no tool_result"):
        ask(tool_server, "", messages=[*messages[:2], {"role": "user", "content": results[:1]}])


@pytest.mark.parametrize(
    ("choice", "is_constrained"),
    [
        ({"type": "auto"}, False),
        ({"type": "any"}, True),
        ({"type": "tool", "name": "get_time"}, True),
        ({"type": "none"}, False),
    ],
)
def test_the_choice_of_tools(tool_server: RunningServer, choice: dict[str, Any], is_constrained: bool) -> None:
    message = ask(tool_server, CALLS["get_time"], tool_choice=choice)
    sampling = tool_server.executor.batches[-1].requests[0].sampling
    assert (sampling.grammar is not None) == is_constrained
    assert (message.content[0].type == "text") == (choice["type"] == "none")


def test_one_call_at_a_time(tool_server: RunningServer) -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert shapes(ask(tool_server, "\n".join(CALLS.values()), tool_choice=choice)) == CALLED[:1]


def test_thinking(tool_server: RunningServer) -> None:
    def sampling() -> Any:
        return tool_server.executor.batches[-1].requests[0].sampling

    ask(tool_server, "ok", thinking={"type": "enabled", "budget_tokens": 2000}, tools=[])
    assert sampling().thinking.max_tokens == 2000
    off = ask(tool_server, "ok", thinking={"type": "disabled"}, tools=[])
    assert prompt_of(tool_server, off.id).endswith("<think>\n\n</think>\n\n")
    hidden = ask(tool_server, f"{THOUGHT}ok", thinking={"type": "adaptive", "display": "omitted"}, tools=[])
    assert shapes(hidden) == [("text", "ok")]


def test_a_model_that_does_not_think_keeps_any_budget(server: RunningServer) -> None:
    with client_of(server) as client:
        message = client.messages.create(
            model=MODEL_NAME, max_tokens=5, messages=HI, thinking={"type": "enabled", "budget_tokens": 2000}
        )
    assert message.content[0].type == "text"
