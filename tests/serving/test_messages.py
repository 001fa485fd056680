"""Anthropic's /v1/messages through the official client: shapes, events, conversations, and what is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from pelton.serving.config import ServerConfig
from tests.serving.keys import key_server, new_key, store_at, tables
from tests.serving.make import ANSWER, MODEL_NAME, RunningServer, running_server
from tests.serving.test_responses import prompt_of
from tests.serving.test_streaming import raw_request
from tests.wait import wait_until

PATH = "/v1/messages"
HI: Any = [{"role": "user", "content": "hi"}]


def client_of(server: RunningServer, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, max_retries=0, **({"api_key": "none"} | options))


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    with client_of(server) as client:
        yield client


def create(client: anthropic.Anthropic, messages: Any = HI, **options: Any) -> Any:
    return client.messages.create(**({"model": MODEL_NAME, "max_tokens": 100, "messages": messages} | options))


def test_a_message(client: anthropic.Anthropic) -> None:
    message = create(client, system="Be brief.", metadata={"user_id": "u"}, extra_body={"temperature": 0, "top_k": 5})
    assert (message.type, message.role, message.model) == ("message", "assistant", MODEL_NAME)
    (block,) = message.content
    assert (block.type, block.text) == ("text", ANSWER)
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.output_tokens == len(ANSWER.encode()) + 1
    assert message._request_id


@pytest.mark.parametrize(
    ("options", "stop_reason", "stop_sequence"),
    [
        ({"max_tokens": 4}, "max_tokens", None),
        ({"max_tokens": 10_000}, "end_turn", None),
        ({"stop_sequences": ["never", "fox"]}, "stop_sequence", "fox"),
    ],
)
def test_why_it_stops(client: anthropic.Anthropic, options: Any, stop_reason: str, stop_sequence: str | None) -> None:
    message = create(client, **options)
    assert (message.stop_reason, message.stop_sequence) == (stop_reason, stop_sequence)
    with client.messages.stream(model=MODEL_NAME, messages=HI, **({"max_tokens": 100} | options)) as stream:
        streamed = stream.get_final_message()
    assert (streamed.stop_reason, streamed.stop_sequence) == (stop_reason, stop_sequence)
    assert streamed.content[0].text == message.content[0].text


def test_a_context_that_ends_first() -> None:
    with running_server(max_model_len=64) as server:
        server.executor.answer = "x" * 100
        message = create(client_of(server), max_tokens=20_000)
        assert message.stop_reason == "model_context_window_exceeded"
        assert message.usage.input_tokens + message.usage.output_tokens == 64


def test_the_events_of_a_stream(client: anthropic.Anthropic) -> None:
    events: list[Any] = list(create(client, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(event.delta.text for event in events[2:-3]) == ANSWER
    assert (events[0].message.content, events[0].message.stop_reason) == ([], None)
    assert (events[-2].delta.stop_reason, events[-2].usage.output_tokens) == ("end_turn", len(ANSWER.encode()) + 1)


def test_the_bytes_of_a_stream(http: httpx2.Client) -> None:
    response = http.post(PATH, json={"messages": HI, "max_tokens": 2, "stream": True})
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert events[1] == 'event: ping\ndata: {"type":"ping"}'
    for event in events:
        name, data = event.split("\n")
        assert json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")


CALL = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "1"}
SHOWN = '<tool_call>{"a": 1}</tool_call>'
USER, ASSISTANT, TOOL = "<|start|>user\n", "<|start|>assistant\n", "<|start|>tool\n"
CONVERSATIONS: list[tuple[str, dict[str, Any], str]] = [
    ("text", {"messages": HI}, f"{USER}hi<|end|>{ASSISTANT}"),
    (
        "system blocks",
        {"system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
                    {"type": "text", "text": "b"}], "messages": HI},
        f"<|start|>system\na\nb<|end|>{USER}hi<|end|>{ASSISTANT}",
    ),
    (
        "turns of one role",
        {"messages": [*HI, {"role": "user", "content": [{"type": "text", "text": text} for text in "ab"]}]},
        f"{USER}hi\na\nb<|end|>{ASSISTANT}",
    ),
    (
        "thinking and a call",
        {"messages": [
            *HI,
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "so"}, CALL]},
            {"role": "user", "content": [RESULT, {"type": "text", "text": "and?"}]},
        ]},
        f"{USER}hi<|end|>{ASSISTANT}so{SHOWN}<|end|>{TOOL}1<|end|>{USER}and?<|end|>{ASSISTANT}",
    ),
    (
        "a failed call",
        {"messages": [*HI, {"role": "assistant", "content": [CALL]}, {"role": "user", "content": [
            {**RESULT, "is_error": True, "content": [{"type": "text", "text": "no"}]}]}]},
        f"{USER}hi<|end|>{ASSISTANT}{SHOWN}<|end|>{TOOL}Error: no<|end|>{ASSISTANT}",
    ),
    ("nothing said", {"messages": [{"role": "user", "content": []}]}, f"{USER}<|end|>{ASSISTANT}"),
    (
        "a beginning of the answer",
        {"messages": [*HI, {"role": "assistant", "content": "It is"}]},
        f"{USER}hi<|end|>{ASSISTANT}It is",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "text"), [row[1:] for row in CONVERSATIONS], ids=[row[0] for row in CONVERSATIONS])
def test_messages_become_a_conversation(tool_server: RunningServer, body: dict[str, Any], text: str) -> None:
    client = client_of(tool_server)
    message = create(client, **body, max_tokens=1)
    assert prompt_of(tool_server, message.id) == text
    usage = message.usage
    counted = client.messages.count_tokens(model=MODEL_NAME, **body)
    assert counted.input_tokens == len(tool_server.executor._prompts[message.id])
    assert counted.input_tokens == (
        usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens
    )


def test_what_was_cached_is_told() -> None:
    with running_server() as server:
        client = client_of(server)
        text = "x" * 100
        system: Any = [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]
        first, again = create(client, system=system), create(client, system=system)
        plain = create(client, system=text)
        num_tokens = len(server.executor._prompts[first.id])
        block_size = 4
        full = num_tokens // block_size * block_size

        def counts(message: Any) -> tuple[int, int, int]:
            usage = message.usage
            return usage.input_tokens, usage.cache_creation_input_tokens, usage.cache_read_input_tokens

        assert counts(first) == (num_tokens - full, full, 0)
        assert sum(counts(again)) == sum(counts(plain)) == num_tokens
        assert counts(again)[2] == counts(plain)[2] > 90
        assert counts(plain)[1] == 0
        with client.messages.stream(model=MODEL_NAME, max_tokens=3, messages=HI, system=system) as stream:
            started = next(iter(stream))
            ended = stream.get_final_message()
        assert counts(started.message) == counts(ended) == counts(again)


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
TOOLS: Any = [{"name": "f", "input_schema": {"type": "object"}}]
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "reads text only"),
    ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "reads text only"),
    ({"messages": [{"role": "user", "content": [{"type": "server_tool_use"}]}]}, "not supported"),
    ({"messages": [{"role": "user", "content": [{**RESULT, "content": [IMAGE]}]}]}, "reads text only"),
    ({"messages": [{"role": "user", "content": [CALL]}]}, "belongs to an assistant"),
    ({"messages": [{"role": "user", "content": [RESULT]}]}, "does not have"),
    ({"messages": [*HI, {"role": "assistant", "content": [CALL]}]}, "ends with a tool_use"),
    ({"messages": [*HI, {"role": "assistant", "content": [CALL]}, *HI]}, "no tool_result"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"system": [IMAGE]}, "system"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0] is of type"),
    ({"tools": [{"name": "f"}]}, "input_schema is required"),
    ({"tool_choice": {"type": "any"}}, "tools is empty"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"thinking": {"type": "enabled"}}, "budget_tokens"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers is not supported"),
    ({"speed": "fast"}, "speed is not supported"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"max_tokens_to_sample": 5}, "unknown parameter"),
    ({"messages": [{"role": "user", "content": "x" * 3000}]}, "context"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSALS)
def test_what_is_refused(client: anthropic.Anthropic, fields: dict[str, Any], words: str) -> None:
    body = {"model": MODEL_NAME, "max_tokens": 5, "messages": HI} | fields
    with pytest.raises(anthropic.BadRequestError) as refused:
        client.post(PATH, body=body, cast_to=object)
    envelope: Any = refused.value.body
    assert set(envelope) == {"type", "error", "request_id"}
    assert (envelope["type"], envelope["error"]["type"]) == ("error", "invalid_request_error")
    assert words in envelope["error"]["message"]


def test_every_error_has_the_envelope() -> None:
    config = ServerConfig(api_key="secret")
    with running_server(config=config) as server, httpx2.Client(base_url=server.url, timeout=30) as http:
        key = {"x-api-key": "secret"}
        valid = {"messages": HI, "max_tokens": 1}
        json_type = {"content-type": "application/json"}

        def ask(method: str = "POST", path: str = PATH, headers: Any = key, **options: Any) -> tuple[int, str]:
            response = http.request(method, path, headers=headers, **({"json": valid} | options))
            body = response.json()
            assert set(body) == {"type", "error", "request_id"}, body
            assert response.headers["request-id"] == body["request_id"]
            return response.status_code, body["error"]["type"]

        assert http.post(PATH, headers=key, json=valid).status_code == 200
        assert http.post(PATH, headers={"authorization": "Bearer secret"}, json=valid).status_code == 200
        assert ask(headers={}) == ask(headers={"x-api-key": "wrong"}) == (401, "authentication_error")
        assert ask(json={**valid, "model": "other"}) == (404, "not_found_error")
        assert ask(path=PATH + "/nothing") == (404, "not_found_error")
        assert ask("GET") == (405, "invalid_request_error")
        assert ask(json=None, content=b"{", headers=key | json_type) == (400, "invalid_request_error")
        assert ask(json=None, content=b"a", headers=key | {"content-type": "text/plain"})[0] == 415
        assert ask(json=None, content=b" " * (33 << 20), headers=key | json_type) == (413, "request_too_large")
        assert ask(headers=key | {"anthropic-version": "2023-01-01"}) == (400, "invalid_request_error")
        server.executor.fail_next = RuntimeError("broken kernel")
        assert ask() == (500, "api_error")
    with running_server(start_engine=False) as server, client_of(server) as client:
        with pytest.raises(anthropic.APIStatusError) as unavailable:
            create(client)
        assert (unavailable.value.status_code, unavailable.value.response.headers["retry-after"]) == (503, "2")
        assert unavailable.value.body["error"]["type"] == "overloaded_error"  # type: ignore[index]


async def test_a_revoked_key_ends_its_streams(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    key_id, key = await new_key(store)
    with key_server(store, delay_s=0.05) as server:
        server.executor.answer = "x" * 1500
        stream = create(client_of(server, api_key=key), max_tokens=1500, stream=True)
        responses = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0).responses
        other: Any = responses.create(model=MODEL_NAME, input="a", max_output_tokens=1500, stream=True)
        next(iter(stream))
        next(iter(other))
        async with tables(store) as access:
            await access.revoke_key(key_id)
        with pytest.raises(anthropic.APIStatusError) as ended:
            list(stream)
        assert ended.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
        assert [event.type for event in other][-2:] == ["error", "response.failed"]
        with pytest.raises(anthropic.AuthenticationError):
            create(client_of(server, api_key=key))
        assert server.client.num_requests == 0


def test_a_tenant_over_its_bound() -> None:
    with running_server(delay_s=0.05, tenants=["default:max_num_running=1,max_num_waiting=1"]) as server:
        errors: list[Any] = []

        def run() -> None:
            try:
                create(client_of(server), max_tokens=20)
            except anthropic.RateLimitError as error:
                errors.append(error)

        threads = [threading.Thread(target=run) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(errors) == 4
        assert all(error.body["error"]["type"] == "rate_limit_error" for error in errors)
        assert all(int(error.response.headers["retry-after"]) >= 1 for error in errors)


def test_an_engine_that_fails_in_mid_stream() -> None:
    with running_server(delay_s=0.005) as server:
        server.executor.answer = "x" * 500
        stream = create(client_of(server), max_tokens=400, stream=True)
        next(iter(stream))
        server.executor.fail_next = RuntimeError("broken kernel")
        with pytest.raises(anthropic.APIStatusError) as failed:
            list(stream)
        assert failed.value.body["error"]["type"] == "api_error"  # type: ignore[index]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_blocks(stream: bool) -> None:
    with running_server(delay_s=0.02) as server:
        server.executor.answer = "x" * 1500
        with raw_request(server, PATH, {"messages": HI, "stream": stream, "max_tokens": 1500}):
            wait_until(lambda: server.client.stats.num_running > 0, "the request never ran")
        wait_until(lambda: server.client.num_requests == 0, "the request was not cancelled")
        wait_until(lambda: server.client.stats.num_blocks_used == 0, "blocks are still held")
