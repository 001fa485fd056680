"""Stored chat completions through the official client."""

from __future__ import annotations

from typing import Any

import httpx2
import openai
import pytest

from pelton.serving.config import ServerConfig
from pelton.store.config import StoreConfig
from tests.serving.make import ANSWER, MODEL_NAME, RunningServer, running_server
from tests.serving.test_sessions import client_of

PATH = "/v1/chat/completions"
MESSAGES: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "hello"}], "name": "ann"},
]


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL_NAME, "messages": MESSAGES, "store": True} | options)


def test_a_stored_answer_is_retrieved_changed_and_deleted(server: RunningServer) -> None:
    completions = client_of(server, tenant="keeper").chat.completions
    made = ask(client_of(server, tenant="keeper"), metadata={"a": "1"}, logprobs=True, top_logprobs=1, n=2)
    found: Any = completions.retrieve(made.id)
    assert found.metadata == {"a": "1"}
    assert found.model_dump(exclude={"metadata"}) == made.model_dump(exclude={"metadata"})
    changed: Any = completions.update(made.id, metadata={"b": "2"})
    assert (changed.id, changed.metadata) == (made.id, {"b": "2"})
    assert [one.id for one in completions.list(metadata={"b": "2"})] == [made.id]
    assert list(completions.list(metadata={"a": "1"})) == []
    deleted = completions.delete(made.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (made.id, True, "chat.completion.deleted")
    attempts: list[Any] = [completions.retrieve, completions.delete, completions.messages.list]
    for attempt in (*attempts, lambda gone: completions.update(gone, metadata=None)):
        with pytest.raises(openai.NotFoundError):
            attempt(made.id)


def test_a_stream_is_stored_whole(openai_client: openai.OpenAI, tool_server: RunningServer) -> None:
    chunks = list(ask(openai_client, stream=True, logprobs=True, stream_options={"include_usage": True}))
    found = openai_client.chat.completions.retrieve(chunks[0].id)
    assert found.choices[0].message.content == ANSWER
    assert found.choices[0].finish_reason == "stop"
    assert found.usage == chunks[-1].usage
    assert len(found.choices[0].logprobs.content) == found.usage.completion_tokens  # type: ignore[union-attr, arg-type]
    tool_server.executor.answer = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    client = client_of(tool_server)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    (first, *_) = list(ask(client, stream=True, tools=[tool]))
    (choice,) = client.chat.completions.retrieve(first.id).choices
    assert (choice.finish_reason, choice.message.tool_calls[0].function.arguments) == ("tool_calls", '{"a": 1}')  # type: ignore[index, union-attr]


def test_what_was_sent_is_listed(server: RunningServer) -> None:
    client = client_of(server, tenant="sender")
    made = ask(client, max_tokens=1)
    listed: Any = client.chat.completions.messages.list(made.id, limit=1)
    assert [message.content for message in listed.data] == ["Be brief."]
    assert listed.has_more
    system, user = list(listed)
    assert (system.role, system.id) == ("system", f"{made.id}-0")
    assert (user.role, user.content, user.name) == ("user", None, "ann")
    assert user.content_parts[0].text == "hello"
    latest: Any = client.chat.completions.messages.list(made.id, order="desc")
    assert [message.id for message in latest] == [user.id, system.id]


def test_pages_and_filters(server: RunningServer) -> None:
    client = client_of(server, tenant="lister")
    # Keys and values that a comparison of text could take for others, or for a pattern.
    pairs = [{"k": "v"}, {"K": "v"}, {"k": "V"}, {"k": "%"}, {"k": "_", "x": "y"}]
    ids = [ask(client, max_tokens=1, metadata=metadata).id for metadata in pairs]
    ask(client, max_tokens=1, store=False)
    ask(client_of(server, tenant="another"), max_tokens=1)
    listing = client.chat.completions.list
    assert [one.id for one in listing(limit=2)] == ids
    assert [one.id for one in listing(limit=2, order="desc")] == ids[::-1]
    assert [one.id for one in listing(after=ids[2]).data] == ids[3:]
    assert [listing(metadata=metadata).data[0].id for metadata in pairs] == ids
    assert [len(listing(metadata=metadata).data) for metadata in pairs] == [1] * 5
    assert listing(metadata={"x": "y", "k": "v"}).data == []
    assert len(listing(model=MODEL_NAME).data) == 5
    assert listing(model="alias").data == []


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("GET", "?limit=0", None, 400, "limit"),
        ("GET", "?order=up", None, 400, "order"),
        ("GET", "?nothing=1", None, 400, "nothing"),
        ("GET", "?metadata=1", None, 400, "metadata"),
        ("GET", "?metadata[a]=1&metadata[a]=2", None, 400, "metadata[a]"),
        ("GET", "?metadata[a][b]=1", None, 400, "metadata[a][b]"),
        ("GET", "?metadata[]=1", None, 400, "metadata[]"),
        ("GET", "/chatcmpl-x", None, 404, None),
        ("GET", "/chatcmpl-x/messages?limit=0", None, 400, "limit"),
        ("POST", "/chatcmpl-x", {}, 400, "metadata"),
        ("POST", "/chatcmpl-x", {"metadata": {"a": 1}}, 400, "metadata[...]"),
        ("POST", "/chatcmpl-x", {"metadata": None, "model": "a"}, 400, "model"),
        ("POST", "", {"messages": MESSAGES, "store": "yes"}, 400, "store"),
    ],
)
def test_what_is_refused(
    http: httpx2.Client, method: str, path: str, body: Any, status: int, param: str | None
) -> None:
    response = http.request(method, PATH + path, **({} if body is None else {"json": body}))
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


def test_as_many_and_as_long_as_allowed(tmp_path: Any) -> None:
    config = ServerConfig(max_stored_responses=10)
    with running_server(config=config, store=StoreConfig(data_dir=str(tmp_path))) as server:
        client = client_of(server)
        made = [ask(client, max_tokens=1).id for _ in range(64)]
        assert [one.id for one in client.chat.completions.list(limit=100).data] == made[-10:]
    with running_server(store=StoreConfig(data_dir=str(tmp_path))) as server:
        assert client_of(server).chat.completions.retrieve(made[-1]).id == made[-1]
