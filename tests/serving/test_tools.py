"""Tools and reasoning through /v1/chat/completions, with the official client and a model whose words are given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from pelton.core.errors import ConfigError
from pelton.core.sampling_params import SamplingParams
from pelton.serving.config import ServerConfig
from tests.serving.make import HERMES_TEMPLATE, TEMPLATE, RunningServer, running_server

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Does {name}",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name in ("get_weather", "get_time")
]
USER: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(chat_template=HERMES_TEMPLATE) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(server: RunningServer, client: openai.OpenAI, answer: str, **options: Any) -> Any:
    server.executor.answer = answer
    return client.chat.completions.create(**({"model": "scripted", "messages": USER} | options))


def last_prompt(server: RunningServer) -> str:
    return bytes(token_id for token_id in list(server.executor._prompts.values())[-1] if token_id < 256).decode()


def last_sampling(server: RunningServer) -> SamplingParams:
    return server.executor.batches[-1].requests[0].sampling


def streamed(chunks: Any) -> tuple[str, str, list[Any], str]:
    """Content, reasoning, calls and finish reason, put together as clients do."""
    content = reasoning = finish_reason = ""
    calls: list[Any] = []
    for chunk in chunks:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or ():
                if call.id is not None:
                    assert call.index == len(calls)
                    assert call.type == "function"
                    calls.append([call.function.name, ""])
                else:
                    assert call.function.name is None
                calls[call.index][1] += call.function.arguments
            finish_reason = choice.finish_reason or finish_reason
    return content, reasoning, calls, finish_reason


def test_a_call(server: RunningServer, client: openai.OpenAI) -> None:
    answer = ask(server, client, f"I look.\n{CALL}", tools=TOOLS)
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    assert call.id.startswith("call_")
    assert (call.type, call.function.name, call.function.arguments) == ("function", "get_weather", '{"city": "Oslo"}')
    assert '"name": "get_time"' in last_prompt(server)


def test_content_is_null_beside_calls_alone(server: RunningServer, client: openai.OpenAI) -> None:
    assert ask(server, client, CALL, tools=TOOLS).choices[0].message.content is None


@pytest.mark.parametrize("text", [CALL, f"So:\n{CALL}\n{CALL}", "No need <tool", "  spaces \n", f"{CALL[:40]}"])
def test_streaming_and_not_agree(server: RunningServer, client: openai.OpenAI, text: str) -> None:
    whole = ask(server, client, text, tools=TOOLS).choices[0]
    content, _, calls, finish_reason = streamed(ask(server, client, text, tools=TOOLS, stream=True))
    assert content == (whole.message.content or "")
    assert calls == [[call.function.name, call.function.arguments] for call in whole.message.tool_calls or ()]
    assert finish_reason == whole.finish_reason


def test_the_name_comes_ahead_of_the_arguments(server: RunningServer, client: openai.OpenAI) -> None:
    deltas = [
        delta.function
        for chunk in ask(server, client, CALL, tools=TOOLS, stream=True)
        for delta in chunk.choices[0].delta.tool_calls or ()
    ]
    assert deltas[0].name == "get_weather"
    assert len(deltas) > 5  # a token of the arguments at a time
    assert json.loads("".join(delta.arguments for delta in deltas)) == {"city": "Oslo"}


def test_every_sequence_has_its_own_calls(server: RunningServer, client: openai.OpenAI) -> None:
    answer = ask(server, client, CALL, tools=TOOLS, n=2)
    assert [choice.message.tool_calls[0].function.name for choice in answer.choices] == ["get_weather"] * 2
    assert len({choice.message.tool_calls[0].id for choice in answer.choices}) == 2


def test_without_tools_markup_is_text(server: RunningServer, client: openai.OpenAI) -> None:
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        answer = ask(server, client, CALL, **options)
        assert answer.choices[0].message.content == CALL
        assert answer.choices[0].message.tool_calls is None
        assert "get_time" not in last_prompt(server)


def test_a_cut_answer_ends_with_length(server: RunningServer, client: openai.OpenAI) -> None:
    answer = ask(server, client, CALL, tools=TOOLS, max_tokens=60)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.tool_calls[0].function.arguments.startswith('{"c')


def test_the_history_goes_through_the_template(server: RunningServer, client: openai.OpenAI) -> None:
    called = ask(server, client, CALL, tools=TOOLS).choices[0].message
    history = [
        *USER,
        called.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": [{"type": "text", "text": "Rain."}]},
    ]
    answer = ask(server, client, "It rains.", tools=TOOLS, messages=history)
    assert answer.choices[0].message.content == "It rains."
    assert answer.choices[0].finish_reason == "stop"
    prompt = last_prompt(server)
    assert '<tool_call>{"city": "Oslo"}</tool_call>' in prompt  # the object, not its text in quotes
    assert "tool\nRain." in prompt


def test_reasoning(server: RunningServer, client: openai.OpenAI) -> None:
    text = f"<think>\nHm, Oslo.\n</think>\n\n{CALL}"
    answer = ask(server, client, text, tools=TOOLS)
    message = answer.choices[0].message
    assert message.reasoning_content == message.reasoning == "Hm, Oslo."
    assert message.content is None
    assert message.tool_calls[0].function.name == "get_weather"
    num_tokens = len("<think>\nHm, Oslo.\n</think>")
    assert answer.usage.completion_tokens_details.reasoning_tokens == num_tokens
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(ask(server, client, text, tools=TOOLS, **options))
    assert streamed(chunks) == ("", "Hm, Oslo.", [["get_weather", '{"city": "Oslo"}']], "tool_calls")
    assert chunks[-1].usage == answer.usage


def test_an_answer_without_reasoning_says_so(server: RunningServer, client: openai.OpenAI) -> None:
    answer = ask(server, client, "Yes.")
    assert answer.choices[0].message.model_extra == {"reasoning_content": None, "reasoning": None}


def test_reasoning_is_hidden_on_demand(server: RunningServer, client: openai.OpenAI) -> None:
    answer = ask(server, client, "<think>Hm.</think>Yes.", extra_body={"include_reasoning": False})
    assert answer.choices[0].message.content == "Yes."
    assert answer.choices[0].message.model_extra == {"reasoning_content": None, "reasoning": None}
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("<think>Hm.</think>")


@pytest.mark.parametrize(
    ("options", "ends_thought", "budget"),
    [
        ({}, False, None),
        ({"reasoning_effort": "none"}, True, None),
        ({"reasoning_effort": "low"}, False, 1024),
        ({"reasoning_effort": "high"}, False, None),
        ({"extra_body": {"thinking_budget": 7}}, False, 7),
        ({"extra_body": {"max_thinking_tokens": 0}}, True, None),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, True, None),
    ],
)
def test_effort(
    server: RunningServer, client: openai.OpenAI, options: Any, ends_thought: bool, budget: int | None
) -> None:
    ask(server, client, "Yes.", **options)
    assert last_prompt(server).endswith("</think>\n\n") == ends_thought
    thinking = last_sampling(server).thinking
    assert (None if thinking is None else thinking.max_tokens) == budget
    if thinking is not None:
        assert bytes(thinking.forced_token_ids) == b"</think>"
        assert bytes(thinking.start_token_ids) == b"<think>"


def test_a_template_without_tools_is_told_of_them() -> None:
    with running_server(chat_template=TEMPLATE) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        answer = ask(server, client, '[{"name": "get_time", "arguments": {"city": "Oslo"}}]', tools=TOOLS)
        assert answer.choices[0].message.tool_calls[0].function.name == "get_time"
        assert '"name": "get_weather"' in last_prompt(server)


def test_the_settings_that_vllm_users_type() -> None:
    config = ServerConfig(tool_call_parser="pythonic", enable_auto_tool_choice=False, reasoning_parser="mistral")
    with running_server(chat_template=HERMES_TEMPLATE, config=config) as server:
        url = f"{server.url}/v1/chat/completions"
        refused = httpx2.post(url, json={"messages": USER, "tools": TOOLS})
        assert refused.json()["error"]["param"] == "tool_choice"
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        answer = ask(server, client, "[THINK]Hm.[/THINK]Yes.")
        assert answer.choices[0].message.model_extra == {"reasoning_content": "Hm.", "reasoning": "Hm."}
    with pytest.raises(ConfigError, match="hermes"):
        ServerConfig(tool_call_parser="nonesuch")


def test_tokenize_counts_tools(server: RunningServer) -> None:
    def count(**options: Any) -> int:
        answer = httpx2.post(f"{server.url}/tokenize", json={"messages": USER, **options})
        return int(answer.json()["count"])

    assert count(tools=TOOLS) > count() + 200


def test_a_regex_for_the_answer_does_not_go_together_with_tools(server: RunningServer, client: openai.OpenAI) -> None:
    for fields in ({"guided_regex": "[0-9]+"}, {"guided_grammar": 'start: "a"'}):
        with pytest.raises(openai.BadRequestError, match="JSON schema or a choice") as refused:
            ask(server, client, CALL, tools=TOOLS, extra_body=fields)
        assert refused.value.param == "tools"
        answer = ask(server, client, "7", tools=TOOLS, tool_choice="none", extra_body=fields)
        assert answer.choices[0].message.content == "7"
