"""Items of /v1/responses: what the official client sends back, what is refused, and conversations summed up."""

from __future__ import annotations

from typing import Any

import httpx2
import openai
import pytest
from pydantic import BaseModel

from tests.serving.make import MODEL_NAME, RunningServer
from tests.serving.test_responses import PATH, create, prompt_of
from tests.serving.test_responses_tools import CALLS, THOUGHT, TOOLS
from tests.serving.test_sessions import client_of

OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "x"}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}


@pytest.mark.parametrize("spelling", ["objects", "set fields", "all fields"])
def test_an_answer_can_be_sent_back(tool_server: RunningServer, spelling: str) -> None:
    """As the client's objects, and as the dictionaries that people make of them."""
    client = client_of(tool_server)
    tool_server.executor.answer = f"{THOUGHT}I look.\n{CALLS['get_weather']}"
    first = create(client, "Weather?", tools=TOOLS, include=["message.output_text.logprobs"])
    output: list[Any] = list(first.output)
    assert [item.type for item in output] == ["reasoning", "message", "function_call"]
    if spelling != "objects":
        options: Any = {"exclude_unset": True} if spelling == "set fields" else {}
        output = [item.model_dump(by_alias=True, **options) for item in output]
    result = {"type": "function_call_output", "call_id": first.output[2].call_id, "output": "Rain."}
    tool_server.executor.answer = "Rain."
    second = create(client, [{"role": "user", "content": "Weather?"}, *output, result], tools=TOOLS)
    assert second.output_text == "Rain."
    assert '<tool_call>{"city": "Oslo"}</tool_call>' in prompt_of(tool_server, second.id)
    listed = client.responses.input_items.list(second.id, order="asc").data
    assert [item.type for item in listed] == [
        "message",
        "reasoning",
        "message",
        "function_call",
        "function_call_output",
    ]
    # Listed items too.
    again = create(client, [item.model_dump(by_alias=True) for item in listed], tools=TOOLS)
    assert prompt_of(tool_server, again.id) == prompt_of(tool_server, second.id)


class City(BaseModel):
    city: str


def test_what_was_parsed_can_be_sent_back(tool_server: RunningServer) -> None:
    client = client_of(tool_server)
    tool_server.executor.answer = '{"city": "Oslo"}'
    response = client.responses.parse(model=MODEL_NAME, input="Where?", text_format=City)
    assert response.output_parsed == City(city="Oslo")
    again: Any = [*response.output, {"role": "user", "content": "And?"}]
    assert create(client, again).status == "completed"
    messages: Any = [{"role": "user", "content": "Where?"}]
    message = (
        client.chat.completions.parse(model=MODEL_NAME, messages=messages, response_format=City).choices[0].message
    )
    assert message.parsed == City(city="Oslo")
    messages += [message, {"role": "user", "content": "And?"}]
    answer = client.chat.completions.create(model=MODEL_NAME, messages=messages)
    assert answer.choices[0].message.content == '{"city": "Oslo"}'


def test_input_may_be_absent_where_there_is_an_earlier_one(server: RunningServer, openai_client: openai.OpenAI) -> None:
    first = create(openai_client, "one", max_output_tokens=1)
    options: Any = {"model": MODEL_NAME, "previous_response_id": first.id}
    second = openai_client.responses.create(**options, max_output_tokens=1)
    end = "<|start|>assistant\n"
    assert prompt_of(server, second.id) == f"<|start|>user\none<|end|>{end}G<|end|>{end}"
    assert list(openai_client.responses.input_items.list(second.id)) == []
    assert second.usage is not None
    assert openai_client.responses.input_tokens.count(**options).input_tokens == second.usage.input_tokens


REFUSALS: list[tuple[Any, str, str]] = [
    ([{"role": "user", "content": "a", "colour": "red"}], "input[0].colour", "unknown_parameter"),
    ([{"role": "user", "content": "a"}, {"role": "user", "content": "a", "arguments": "{}"}], "input[1].arguments",
     "unknown_parameter"),
    ([{**CALL, "role": "assistant"}], "input[0].role", "unknown_parameter"),
    ([{**CALL, "namespace": "n"}], "input[0].namespace", "unsupported_parameter"),
    ([CALL, {**OUTPUT, "caller": {"type": "direct"}}], "input[1].caller", "unsupported_parameter"),
    ([{"role": "user", "content": "a", "phase": "last"}], "input[0].phase", "invalid_value"),
    ([{"role": "user", "content": [{"type": "input_text", "text": "a", "bold": True}]}], "input[0].content[0].bold",
     "unknown_parameter"),
    ([{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}], "input[0].content[0].type",
     "unsupported_content_type"),
    ([CALL, {**OUTPUT, "output": [{"type": "input_image", "image_url": "u"}]}], "input[1].output[0].type",
     "unsupported_content_type"),
    ([{"action": {"type": "click"}, "type": "computer_call"}], "input[0].type", "unsupported_parameter"),
    ([{"type": "compaction", "encrypted_content": "!"}], "input[0].encrypted_content", "invalid_request_error"),
    ([{"type": "compaction"}], "input[0].encrypted_content", "missing_required_parameter"),
    ([7], "input[0]", "invalid_type"),
    (None, "input", "missing_required_parameter"),
]  # fmt: skip


@pytest.mark.parametrize(("input", "param", "code"), REFUSALS)
def test_nothing_is_accepted_and_ignored(http: httpx2.Client, input: Any, param: str, code: str) -> None:
    response = http.post(PATH, json={"input": input})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert code in (error["code"], error["type"]), error


@pytest.mark.parametrize("path", [PATH, "/v1/chat/completions"])
def test_parts_that_are_no_text_are_refused(http: httpx2.Client, path: str) -> None:
    """They are decoded after the rest of the body."""
    name = b"input" if path == PATH else b"messages"
    for part in (
        b'"text":"\xa3"',
        b'"text":"\\ud800"',
        b'"\xa3":1',
        b'"text":1,"b":"\xa3"',
        b'"text":' + b"[" * 2000 + b"]" * 2000,
    ):
        body = b'{"' + name + b'":[{"role":"user","content":[{"type":"text",' + part + b"}]}]}"
        response = http.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400, response.text
    body = b'{"' + name + b'":[{"role":"user","content":[{"type":"text","text":"\xa3"}]}]}'
    error = http.post(path, content=body, headers={"content-type": "application/json"}).json()["error"]
    assert (error["code"], error["message"]) == ("invalid_json", "the body is not valid UTF-8")


TOOL_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"type": "mcp", "server_label": "a", "server_url": "u"}, "tools[0].type"),
    ({"type": "function", "name": "f", "colour": "red"}, "tools[0].colour"),
    ({"type": "function", "name": "f", "defer_loading": True}, "tools[0].defer_loading"),
]


@pytest.mark.parametrize(("tool", "param"), TOOL_REFUSALS)
def test_nothing_of_a_tool_is_ignored(http: httpx2.Client, tool: dict[str, Any], param: str) -> None:
    response = http.post(PATH, json={"input": "a", "tools": [tool]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "text", "text": "a", "bold": True}, "messages[0].content[0].bold"),
        ({"type": "image_url", "image_url": {"url": "u"}}, "messages[0].content[0].type"),
        ({"type": "text", "text": 1}, "messages[0].content[0].text"),
        ({"type": "text"}, "messages[0].content[0].text"),
    ],
)
def test_nothing_of_a_chats_part_is_ignored(http: httpx2.Client, part: dict[str, Any], param: str) -> None:
    response = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [part]}]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_a_conversation_is_summed_up(tool_server: RunningServer) -> None:
    client = client_of(tool_server)
    tool_server.executor.answer = "ok"
    first = create(client, [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}])
    tool_server.executor.answer = "The user counts. "
    compacted = client.responses.compact(
        model=MODEL_NAME, input="three", previous_response_id=first.id, instructions="Be brief."
    )
    assert compacted.object == "response.compaction"
    prompt = prompt_of(tool_server, compacted.id)
    assert prompt.startswith("<|start|>system\nBe brief.<|end|><|start|>user\none<|end|>")
    assert "assistant\nok<|end|><|start|>user\nthree\n\nSum up the conversation" in prompt
    assert compacted.usage.output_tokens == len("The user counts. ") + 1
    *said, summary = compacted.output
    assert [item.content[0].text for item in said] == ["one", "two", "three"]  # type: ignore[union-attr]
    assert summary.type == "compaction"
    again: Any = [*compacted.output, {"role": "user", "content": "four"}]
    second = create(client, again)
    assert prompt_of(tool_server, second.id).startswith(
        "<|start|>user\none\n\ntwo\n\nthree<|end|><|start|>assistant\nSummary of the conversation so far:\n"
        "The user counts.<|end|><|start|>user\nfour<|end|>"
    )
    listed = client.responses.input_items.list(second.id, order="asc").data
    assert [item.type for item in listed][-2:] == ["compaction", "message"]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(compacted.id)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"input": "a"}, 400, "model"),
        ({"model": MODEL_NAME}, 400, "input"),
        ({"model": "other", "input": "a"}, 404, "model"),
        ({"model": None, "input": "x" * 3000}, 400, "input"),
        ({"model": None, "input": "a", "service_tier": "flex"}, 400, "service_tier"),
        ({"model": None, "previous_response_id": "resp_x"}, 400, "previous_response_id"),
    ],
)
def test_what_is_not_summed_up(http: httpx2.Client, body: dict[str, Any], status: int, param: str) -> None:
    response = http.post(f"{PATH}/compact", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


def test_a_long_conversation_has_room_for_its_summary(tool_server: RunningServer) -> None:
    tool_server.executor.answer = "short"
    compacted = client_of(tool_server).responses.compact(model=MODEL_NAME, input="x" * 1700)
    assert compacted.usage.input_tokens + 1024 > 2048
    assert compacted.usage.output_tokens == len("short") + 1
