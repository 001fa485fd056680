"""Tools, reasoning and formats through /v1/responses, with a model whose words are given."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serving.make import MODEL_NAME, RunningServer
from tests.serving.test_responses import prompt_of
from tests.serving.test_sessions import client_of

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [{"type": "function", "name": name, "parameters": PARAMETERS} for name in ("get_weather", "get_time")]
ALLOWED: Any = [{"type": "function", "name": "get_weather"}]
CALLS = {
    name: f'<tool_call>\n{{"name": "{name}", "arguments": {{"city": "Oslo"}}}}\n</tool_call>'
    for name in ("get_weather", "get_time")
}
THOUGHT = "<think>\nLet me see.\n</think>\n\n"


def ask(server: RunningServer, answer: str, **options: Any) -> Any:
    server.executor.answer = answer
    options = {"model": MODEL_NAME, "input": "Weather in Oslo?", "tools": TOOLS} | options
    return client_of(server).responses.create(**options)


def shapes(response: Any) -> list[tuple[Any, ...]]:
    """What is in a response, without its ids."""
    found: list[tuple[Any, ...]] = []
    for item in response.output:
        if item.type == "function_call":
            found.append((item.type, item.status, item.name, item.arguments))
        else:
            found.append((item.type, item.status, item.content[0].text))
    return found


CALLED = [("function_call", "completed", name, '{"city": "Oslo"}') for name in ("get_weather", "get_time")]
ANSWERS: list[tuple[str, list[tuple[Any, ...]]]] = [
    (CALLS["get_weather"], CALLED[:1]),
    ("\n".join(CALLS.values()), CALLED),
    (f"I look.\n{CALLS['get_weather']}", [("message", "completed", "I look."), CALLED[0]]),
    (
        f"{THOUGHT}So:\n{CALLS['get_time']}",
        [("reasoning", "completed", "Let me see."), ("message", "completed", "So:"), CALLED[1]],
    ),
    (f"{THOUGHT}Sunny.", [("reasoning", "completed", "Let me see."), ("message", "completed", "Sunny.")]),
    ("No <tool", [("message", "completed", "No <tool")]),
    ("", [("message", "completed", "")]),
]


@pytest.mark.parametrize(("answer", "expected"), ANSWERS)
def test_streamed_and_not_agree(tool_server: RunningServer, answer: str, expected: list[tuple[Any, ...]]) -> None:
    whole = ask(tool_server, answer)
    assert shapes(whole) == expected
    events: list[Any] = list(ask(tool_server, answer, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert shapes(events[-1].response) == expected
    # What the single events say comes to the same.
    added = [event.item for event in events if event.type == "response.output_item.added"]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.id for item in added] == [item.id for item in done]
    assert done == events[-1].response.output
    for index, item in enumerate(done):
        own = [event for event in events if getattr(event, "output_index", None) == index]
        text = "".join(event.delta for event in own if event.type.endswith(".delta"))
        assert text == (item.arguments if item.type == "function_call" else item.content[0].text)


def test_the_events_of_a_call(tool_server: RunningServer) -> None:
    events: list[Any] = list(ask(tool_server, THOUGHT + CALLS["get_time"], stream=True))
    assert list(dict.fromkeys(event.type for event in events)) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.completed",
    ]
    done = next(event for event in events if event.type == "response.function_call_arguments.done")
    assert json.loads(done.arguments) == {"city": "Oslo"}


def test_reasoning_tokens_are_counted(tool_server: RunningServer) -> None:
    usage = ask(tool_server, f"{THOUGHT}Sunny.").usage
    assert usage.output_tokens_details.reasoning_tokens == len(THOUGHT.rstrip())
    assert usage.output_tokens == len(f"{THOUGHT}Sunny.") + 1


def test_a_call_that_is_cut_off(tool_server: RunningServer) -> None:
    response = ask(tool_server, CALLS["get_weather"], max_output_tokens=60)
    assert (response.status, response.output[0].status) == ("incomplete", "incomplete")
    assert response.output[0].arguments.startswith('{"c')
    again = ask(tool_server, "ok", previous_response_id=response.id)
    assert "<tool_call>" not in prompt_of(tool_server, again.id).partition("</tools>")[2]


def test_a_loop_of_calls(tool_server: RunningServer) -> None:
    first = ask(tool_server, THOUGHT + CALLS["get_weather"])
    call = first.output[-1]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    by_id = ask(tool_server, "Done.", previous_response_id=first.id, input=[result])
    question: Any = {"role": "user", "content": "Weather in Oslo?"}
    by_items = ask(tool_server, "Done.", input=[question, *first.output, result])
    assert prompt_of(tool_server, by_id.id) == prompt_of(tool_server, by_items.id)
    assert '<tool_call>{"city": "Oslo"}</tool_call><|end|><|start|>tool\nsunny' in prompt_of(tool_server, by_id.id)
    assert by_id.output_text == "Done."


def test_sealed_reasoning_comes_back(tool_server: RunningServer) -> None:
    include: Any = ["reasoning.encrypted_content"]
    first = ask(tool_server, f"{THOUGHT}Sunny.", include=include, store=False)
    sealed = first.output[0].encrypted_content
    assert sealed
    item: Any = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": sealed}
    chat = ask(tool_server, "ok", input=[{"role": "user", "content": "a"}, item, {"role": "user", "content": "b"}])
    assert chat.output_text == "ok"
    assert ask(tool_server, f"{THOUGHT}Sunny.").output[0].encrypted_content is None


@pytest.mark.parametrize(
    ("options", "is_constrained"),
    [
        ({}, False),
        ({"tool_choice": "required"}, True),
        ({"tool_choice": {"type": "function", "name": "get_time"}}, True),
        ({"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": ALLOWED}}, True),
        ({"tools": None, "text": {"format": {"type": "json_schema", "name": "a", "schema": PARAMETERS}}}, True),
    ],
)
def test_what_holds_the_model_to_a_format(
    tool_server: RunningServer, options: dict[str, Any], is_constrained: bool
) -> None:
    response = ask(tool_server, CALLS["get_weather"], **options)
    sampling = tool_server.executor.batches[-1].requests[0].sampling
    assert (sampling.grammar is not None) == is_constrained
    echoed = options.get("tool_choice", "auto")
    assert (response.tool_choice if isinstance(echoed, str) else response.tool_choice.type) == (
        echoed if isinstance(echoed, str) else echoed["type"]
    )


def test_one_call_at_a_time(tool_server: RunningServer) -> None:
    response = ask(tool_server, "\n".join(CALLS.values()), parallel_tool_calls=False)
    assert [item.type for item in response.output] == ["function_call"]
    assert response.parallel_tool_calls is False
