"""/v1/responses through the official client: shapes, events, conversations, and what is refused."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx2
import openai
import pytest

from tests.serving.make import ANSWER, MODEL_NAME, RunningServer, running_server
from tests.serving.test_sessions import client_of, sessions_of
from tests.serving.test_streaming import raw_request
from tests.wait import wait_until

PATH = "/v1/responses"


def create(client: openai.OpenAI, input: Any = "hi", **options: Any) -> Any:
    return client.responses.create(model=MODEL_NAME, input=input, **options)


def prompt_of(server: RunningServer, response_id: str) -> str:
    """What the engine was given, special tokens shown."""
    marks = {256: "<|end|>", 257: "<|start|>"}
    data = b"".join(
        marks[token_id].encode() if token_id in marks else bytes([token_id])
        for token_id in server.executor._prompts[response_id]
    )
    return data.decode()


def test_a_response(openai_client: openai.OpenAI) -> None:
    response = create(openai_client, instructions="Be brief.", metadata={"a": "b"}, user="u", temperature=0)
    assert response.output_text == ANSWER
    assert (response.status, response.object, response.model) == ("completed", "response", MODEL_NAME)
    assert response.completed_at >= response.created_at
    (message,) = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.usage.output_tokens == len(ANSWER.encode()) + 1
    assert (response.instructions, response.metadata, response.user) == ("Be brief.", {"a": "b"}, "u")
    assert (response.temperature, response.store, response.background) == (0.0, True, False)
    assert response.incomplete_details is response.error is None


def test_a_response_that_is_cut_off(openai_client: openai.OpenAI) -> None:
    response = create(openai_client, max_output_tokens=9, top_logprobs=2)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"
    logprobs = response.output[0].content[0].logprobs
    assert b"".join(bytes(entry.bytes) for entry in logprobs) == ANSWER.encode()[:9]
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs)


EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


def test_the_events_of_a_stream(openai_client: openai.OpenAI) -> None:
    events: list[Any] = list(create(openai_client, stream=True))
    assert list(dict.fromkeys(event.type for event in events)) == EVENTS
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == ANSWER
    created, done = events[0].response, events[-1].response
    assert (created.status, created.output, created.usage) == ("in_progress", [], None)
    assert done.output_text == ANSWER
    assert {event.item_id for event in deltas} == {done.output[0].id}
    assert openai_client.responses.retrieve(done.id) == done


def test_the_bytes_of_a_stream(http: httpx2.Client) -> None:
    response = http.post(PATH, json={"input": "hi", "stream": True, "max_output_tokens": 2, "store": False})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done = response.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    for event in events:
        name, data = event.split("\n")
        assert json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")
    assert json.loads(events[-1].partition("data: ")[2])["response"]["status"] == "incomplete"


def test_streamed_logprobs_are_those_of_the_answer(openai_client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"include": ["message.output_text.logprobs"], "max_output_tokens": 12}
    events: list[Any] = list(create(openai_client, stream=True, **options))
    streamed = [entry.token for event in events if event.type.endswith("text.delta") for entry in event.logprobs]
    whole = create(openai_client, **options).output[0].content[0].logprobs
    assert streamed == [entry.token for entry in whole]


CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
CONVERSATIONS: list[tuple[str, Any, str]] = [
    ("text", "hi", "<|start|>user\nhi<|end|>"),
    ("easy message", [{"role": "user", "content": "hi"}], "<|start|>user\nhi<|end|>"),
    (
        "parts",
        [{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "a"}] * 2}],
        "<|start|>system\na\na<|end|>",
    ),
    (
        "echoed output",
        [
            {"role": "user", "content": "a"},
            {"id": "rs_1", "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
            {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
             "content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}]},
            {"role": "user", "content": "c"},
        ],
        "<|start|>user\na<|end|><|start|>assistant\nb<|end|><|start|>user\nc<|end|>",
    ),
    (
        "calls and their outputs",
        [CALL, {**CALL, "call_id": "c2"},
         {"type": "function_call_output", "call_id": "c2", "output": "two"},
         {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "one"}]}],
        '<|start|>assistant\n<tool_call>{"a": 1}</tool_call><tool_call>{"a": 1}</tool_call><|end|>'
        "<|start|>tool\ntwo<|end|><|start|>tool\none<|end|>",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("input", "text"), [row[1:] for row in CONVERSATIONS], ids=[row[0] for row in CONVERSATIONS])
def test_items_become_a_conversation(tool_server: RunningServer, input: Any, text: str) -> None:
    client = client_of(tool_server)
    response = create(client, input, max_output_tokens=1)
    assert prompt_of(tool_server, response.id) == text + "<|start|>assistant\n"
    tokens = client.responses.input_tokens.count(model=MODEL_NAME, input=input)
    assert tokens.input_tokens == response.usage.input_tokens


def test_a_conversation_goes_on_from_a_response(server: RunningServer, openai_client: openai.OpenAI) -> None:
    first = create(openai_client, "one", instructions="first", max_output_tokens=3)
    second = create(openai_client, "two", instructions="second", previous_response_id=first.id, max_output_tokens=1)
    third = create(openai_client, "three", previous_response_id=second.id, max_output_tokens=1, store=False)
    assert prompt_of(server, third.id) == (
        "<|start|>user\none<|end|><|start|>assistant\nGr\ufffd<|end|><|start|>user\ntwo<|end|>"
        "<|start|>assistant\nG<|end|><|start|>user\nthree<|end|><|start|>assistant\n"
    )
    assert prompt_of(server, second.id).startswith("<|start|>system\nsecond<|end|><|start|>user\none")
    assert third.previous_response_id == second.id
    with pytest.raises(openai.NotFoundError):
        openai_client.responses.retrieve(third.id)
    openai_client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError) as gone:
        create(openai_client, "four", previous_response_id=second.id)
    assert (gone.value.code, gone.value.param) == ("previous_response_not_found", "previous_response_id")


def test_a_response_names_the_session() -> None:
    with running_server() as server:
        client = client_of(server)
        first = create(client, "a")
        create(client, "b", previous_response_id=first.id)
        (session,) = sessions_of(server)
        assert session["num_turns"] == 2


def test_an_item_can_be_referred_to(server: RunningServer, openai_client: openai.OpenAI) -> None:
    first = create(openai_client, max_output_tokens=2)
    items = [{"type": "item_reference", "id": first.output[0].id}, {"role": "user", "content": "more"}]
    second = create(openai_client, items, max_output_tokens=1)
    assert "<|start|>assistant\nGr<|end|><|start|>user\nmore" in prompt_of(server, second.id)


def test_input_items_are_listed(openai_client: openai.OpenAI) -> None:
    items: Any = [{"role": "user", "content": f"number {index}"} for index in range(5)]
    response = create(openai_client, items, max_output_tokens=1)
    listed = openai_client.responses.input_items.list(response.id, order="asc", limit=2)
    assert [item.content[0].text for item in listed.data] == ["number 0", "number 1"]
    assert [item.content[0].text for item in listed] == [f"number {index}" for index in range(5)]
    latest: Any = next(iter(openai_client.responses.input_items.list(response.id)))
    assert latest.content[0].text == "number 4"


def test_tenants_see_only_their_own(server: RunningServer) -> None:
    alice, bob = client_of(server, tenant="alice"), client_of(server, tenant="bob")
    secret = create(alice, "secret", max_output_tokens=2)
    item: Any = [{"type": "item_reference", "id": secret.output[0].id}]
    for attempt in (
        lambda: bob.responses.retrieve(secret.id),
        lambda: list(bob.responses.retrieve(secret.id, stream=True)),
        lambda: bob.responses.cancel(secret.id),
        lambda: bob.responses.delete(secret.id),
        lambda: bob.responses.input_items.list(secret.id),
    ):
        with pytest.raises(openai.NotFoundError):
            attempt()
    for options in ({"previous_response_id": secret.id}, {"input": item}):
        with pytest.raises(openai.BadRequestError):
            create(bob, **({"input": "x"} | options))
    assert alice.responses.retrieve(secret.id).id == secret.id


FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}}
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input"),
    ({"input": [{"type": "computer_call", "id": "a"}]}, "input[0].type"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].type"),
    ({"input": [{"type": "function_call_output", "call_id": "x", "output": "a"}]}, "input[0].call_id"),
    ({"input": [{"type": "item_reference", "id": "msg_x"}]}, "input[0].id"),
    ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "!"}]}, "input[0].encrypted_content"),
    ({"previous_response_id": "resp_x"}, "previous_response_id"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [FUNCTION], "tool_choice": {"type": "mcp", "server_label": "a"}}, "tool_choice.type"),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"background": True, "store": False}, "background"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"include": ["file_search_call.results"]}, "include[0]"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 99999}, "max_output_tokens"),
    ({"temperature": True}, "temperature"),
    ({"input": "x" * 3000}, "input"),
    ({"inputs": "x"}, "inputs"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSALS)
def test_what_is_refused(http: httpx2.Client, fields: dict[str, Any], param: str) -> None:
    response = http.post(PATH, json={"input": "hi", **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error


@pytest.mark.parametrize(
    ("method", "path", "param"),
    [
        ("GET", "?stream=maybe", "stream"),
        ("GET", "?starting_after=1", "starting_after"),
        ("GET", "?stream=true&starting_after=-1", "starting_after"),
        ("GET", "?nothing=1", "nothing"),
        ("GET", "?include[]=file_search_call.results&include[]=x", "include"),
        ("GET", "?include_obfuscation=true", "include_obfuscation"),
        ("GET", "?stream=true", "stream"),
        ("GET", "/input_items?limit=0", "limit"),
        ("GET", "/input_items?order=up", "order"),
        ("GET", "/input_items?include=file_search_call.results", "include"),
        ("POST", "/cancel", None),
    ],
)
def test_what_is_refused_of_a_stored_one(http: httpx2.Client, method: str, path: str, param: str | None) -> None:
    response_id = http.post(PATH, json={"input": "hi", "max_output_tokens": 1}).json()["id"]
    response = http.request(method, f"{PATH}/{response_id}{path}")
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert (error["code"] == "unsupported_parameter") == (param or "").startswith("include")


def test_answers_have_every_field_of_the_clients_types(server: RunningServer) -> None:
    """The client's strict mode wants what its types call required."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True)
    response = create(client)
    assert response.usage.input_tokens_details.cache_write_tokens == 0
    assert client.responses.retrieve(response.id) == response
    assert len(client.responses.input_items.list(response.id).data) == 1
    assert list(create(client, stream=True))[-1].response.output_text == ANSWER


def test_truncation_drops_the_oldest(server: RunningServer, openai_client: openai.OpenAI) -> None:
    items: Any = [{"role": "user", "content": f"{index} " + "x" * 300} for index in range(12)]
    with pytest.raises(openai.BadRequestError) as too_long:
        create(openai_client, items, instructions="stay", max_output_tokens=4)
    assert too_long.value.code == "context_length_exceeded"
    response = create(openai_client, items, instructions="stay", max_output_tokens=4, truncation="auto")
    prompt = prompt_of(server, response.id)
    assert prompt.startswith("<|start|>system\nstay<|end|><|start|>user\n6 x")
    assert response.usage.input_tokens + 4 <= 2048
    with pytest.raises(openai.BadRequestError):
        create(openai_client, "x" * 3000, truncation="auto")


def test_an_engine_that_fails_is_told_in_band() -> None:
    with running_server(delay_s=0.005) as server:
        client = client_of(server)
        server.executor.fail_next = RuntimeError("broken kernel")
        with pytest.raises(openai.InternalServerError):
            create(client)
        stream = create(client, stream=True, max_output_tokens=500, extra_body={"ignore_eos": True})
        next(stream)
        server.executor.fail_next = RuntimeError("broken kernel")
        *_, error, failed = list(stream)
        assert (error.type, error.code) == ("error", "engine_step_failed")
        assert failed.type == "response.failed"
        assert (failed.response.status, failed.response.error.code) == ("failed", "engine_step_failed")
        assert failed.sequence_number == error.sequence_number + 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_blocks(slow_server: RunningServer, stream: bool) -> None:
    body = {"input": "a", "stream": stream, "max_output_tokens": 1500, "ignore_eos": True}
    client = slow_server.client
    with raw_request(slow_server, PATH, body):
        wait_until(lambda: client.stats.num_running > 0, "the request never ran")
    wait_until(lambda: client.num_requests == 0, "the request was not cancelled")
    wait_until(lambda: client.stats.num_running == client.stats.num_blocks_used == 0, "blocks are still held")


def test_many_at_once() -> None:
    with running_server(max_num_seqs=16, max_num_waiting=64) as server:
        client = client_of(server)
        texts: list[str] = []

        def run(index: int) -> None:
            first = create(client, f"number {index}")
            events: list[Any] = list(create(client, "go on", previous_response_id=first.id, stream=True))
            texts.append(events[-1].response.output_text)

        threads = [threading.Thread(target=run, args=(index,)) for index in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert texts == [ANSWER] * 24
        assert server.client.num_requests == 0


def test_bodies_that_are_no_requests(http: httpx2.Client) -> None:
    deep = b'{"input":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert http.post(PATH, content=deep, headers={"content-type": "application/json"}).status_code == 400
    assert http.post(PATH, content=b"x" * (33 << 20)).status_code == 413
    assert http.post(PATH, json={"input": [{"role": "user", "content": "a"}] * 20_000}).status_code == 400
    assert http.post(PATH, json={"input": "a", "seed": 2**70}).status_code == 400
