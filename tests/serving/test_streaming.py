"""Server-sent events byte by byte, errors in the middle of a stream, and clients that vanish."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import openai
import pytest

from pelton.serving import sse
from pelton.serving.config import ServerConfig
from tests.serving.make import ANSWER, MODEL_NAME, RunningServer, running_server
from tests.wait import wait_until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG: dict[str, Any] = {"max_tokens": 1500, "ignore_eos": True}


def events(body: bytes) -> list[bytes]:
    assert body.endswith(b"\n\n")
    parts = body[:-2].split(b"\n\n")
    assert all(part.startswith(b"data: ") and b"\n" not in part for part in parts)
    return [part.removeprefix(b"data: ") for part in parts]


def test_bytes_of_a_chat_stream(http: httpx2.Client) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream": True, "cache_salt": "bytes"}
    response = http.post(CHAT, json=body | {"stream_options": {"include_usage": True}})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    role, first, last, usage, done = events(response.content)
    frame = json.loads(role)
    names = ("id", "created", "system_fingerprint")
    head = {"object": "chat.completion.chunk", "model": MODEL_NAME, **{name: frame[name] for name in names}}

    def chunk(delta: Any, finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**head, "choices": [choice], "usage": None}

    assert json.loads(role) == chunk({"role": "assistant", "content": ""}, None)
    assert json.loads(first) == chunk({"content": "G"}, None)
    assert json.loads(last) == chunk({"content": "r"}, "length")
    counts = {"prompt_tokens": 20, "completion_tokens": 2, "total_tokens": 22}
    details = {"cached_tokens": 0}
    assert json.loads(usage) == {**head, "choices": [], "usage": {**counts, "prompt_tokens_details": details}}
    assert done == b"[DONE]"


def test_usage_in_every_chunk_of_every_stream() -> None:
    with running_server(config=ServerConfig(enable_force_include_usage=True)) as server:
        for path, prompt in ((CHAT, {"messages": [{"role": "user", "content": "hi"}]}), (COMPLETIONS, {"prompt": "a"})):
            body = {**prompt, "max_tokens": 3, "stream": True}
            *chunks, done = events(httpx2.post(server.url + path, json=body).content)
            counts = [json.loads(chunk)["usage"]["completion_tokens"] for chunk in chunks]
            assert (done, counts[-1], counts) == (b"[DONE]", 3, sorted(counts))
            assert json.loads(chunks[-1])["choices"] == []


def test_bytes_of_a_completion_stream(http: httpx2.Client) -> None:
    response = http.post(COMPLETIONS, json={"prompt": "a", "stop": "r", "stream": True})
    first, last, done = events(response.content)
    assert json.loads(first)["choices"] == [{"index": 0, "text": "G", "logprobs": None, "finish_reason": None}]
    assert json.loads(last)["choices"] == [
        {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop", "stop_reason": "r"}
    ]
    assert "usage" not in json.loads(first)
    assert done == b"[DONE]"


def test_text_is_not_escaped_twice_or_split(http: httpx2.Client) -> None:
    text = ""
    for event in events(http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 90, "stream": True}).content)[:-1]:
        text += json.loads(event)["choices"][0]["text"]
    assert text == ANSWER


def test_one_write_per_step(slow_server: RunningServer) -> None:
    with raw_request(slow_server, COMPLETIONS, {"prompt": "a", "max_tokens": 2, "stream": True}) as connection:
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += connection.recv(4096)
    body = data.partition(b"\r\n\r\n")[2]
    sizes = []
    while body:
        size, _, body = body.partition(b"\r\n")
        sizes.append(int(size, 16))
        body = body[sizes[-1] + 2 :]
    # A chunk of HTTP per step; the end mark travels with the last.
    assert len(sizes) == 3
    assert sizes[-1] == 0


def test_error_after_the_first_byte_comes_in_band() -> None:
    with running_server(delay_s=0.005) as server, httpx2.Client(base_url=server.url, timeout=30) as http:
        with http.stream("POST", COMPLETIONS, json={"prompt": "a", "stream": True, **LONG}) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            next(lines)
            server.executor.fail_next = RuntimeError("broken kernel")
            rest = [line for line in lines if line]
        error = json.loads(rest[-1].removeprefix("data: "))
        assert error["error"]["code"] == "engine_step_failed"
        assert error["error"]["type"] == "server_error"
        assert "data: [DONE]" not in rest
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model=MODEL_NAME, prompt="a", stream=True, max_tokens=500)
        next(stream)
        server.executor.fail_next = RuntimeError("broken kernel")
        with pytest.raises(openai.APIError, match="broken kernel"):
            list(stream)


def test_deadline_in_the_middle_of_a_stream(slow_server: RunningServer) -> None:
    body = {"prompt": "a", "stream": True, "timeout_s": 0.3, **LONG}
    with httpx2.Client(base_url=slow_server.url, timeout=30) as http:
        *_, last = events(http.post(COMPLETIONS, json=body).content)
    assert json.loads(last)["error"]["code"] == "deadline_exceeded"


@contextmanager
def raw_request(server: RunningServer, path: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as connection:
        connection.sendall(head.encode() + data)
        yield connection


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "stream": True}),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "n": 3}),
        (COMPLETIONS, {"prompt": "a"}),
        (COMPLETIONS, {"prompt": ["a", "b", "c"], "stream": True}),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": 2}),
    ],
)
def test_a_client_that_vanishes_frees_its_blocks(slow_server: RunningServer, path: str, body: dict[str, Any]) -> None:
    client, executor = slow_server.client, slow_server.executor
    with raw_request(slow_server, path, body | LONG) as connection:
        wait_until(lambda: client.stats.num_running > 0, "the request never ran")
        if body.get("stream"):
            assert b"200 OK" in connection.recv(1000)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # a reset, not a farewell
        num_steps = len(executor.batches)
    wait_until(lambda: client.num_requests == 0, "the request was not cancelled")
    wait_until(lambda: client.stats.num_running == client.stats.num_blocks_used == 0, "blocks are still held")
    # Far fewer than the 1,500 steps it asked for; a busy machine may take a few to notice.
    assert len(executor.batches) - num_steps < 50


def test_200_clients_that_vanish() -> None:
    with running_server(delay_s=0.002, max_num_seqs=32, max_num_waiting=512) as server:
        body = {"prompt": "a", "stream": True, **LONG}
        connections = []
        for _ in range(200):
            context = raw_request(server, COMPLETIONS, body)
            connections.append((context, context.__enter__()))
        wait_until(lambda: server.client.num_requests == 200, "not every request arrived")
        for context, _ in connections:
            context.__exit__(None, None, None)
        wait_until(lambda: server.client.num_requests == 0, "requests are left over")
        wait_until(lambda: server.client.stats.num_blocks_used == 0, "blocks are left over")
        with httpx2.Client(base_url=server.url) as http:
            assert http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 2}).json()["choices"][0]["text"] == "Gr"
            metrics = http.get("/metrics").text
            assert 'finished_reason="abort",model_name="scripted"} 200.0' in metrics


def test_a_client_that_vanishes_before_its_prompt_is_tokenized(server: RunningServer) -> None:
    with raw_request(server, CHAT, {"messages": [{"role": "user", "content": "a" * 1500}], **LONG, "max_tokens": 400}):
        pass
    wait_until(lambda: server.client.num_requests == 0, "the request was not cancelled")


def test_a_client_that_stops_reading_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "STALL_CHECK_S", 0.05)
    monkeypatch.setattr(sse, "MAX_STALL_S", 0.1)
    with running_server(max_num_seqs=64, max_num_waiting=64) as server:
        body = {"prompt": "a", "stream": True, "n": 64, "logprobs": 20, **LONG}
        data = json.dumps(body).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
            connection.sendall(head.encode() + data)
            wait_until(lambda: server.client.stats.num_running > 0, "the request never ran")
            wait_until(lambda: server.client.num_requests == 0, "the request was not given up")
            assert server.client.stats.num_output_tokens_total < 64 * 1500
