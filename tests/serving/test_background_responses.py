"""Responses that run in the background and those that outlive the server."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from pelton.store.config import StoreConfig
from tests.serving.make import ANSWER, MODEL_NAME, RunningServer, running_server
from tests.serving.test_responses import EVENTS, create
from tests.serving.test_sessions import client_of
from tests.wait import wait_until


def wait_for(client: openai.OpenAI, response_id: str) -> Any:
    """The response once it has ended."""
    deadline_s = time.monotonic() + 20
    while (response := client.responses.retrieve(response_id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return response


def test_it_runs_by_itself(slow_server: RunningServer) -> None:
    client = client_of(slow_server)
    create(client, max_output_tokens=1)  # opens the database
    queued = create(client, background=True, max_output_tokens=20)
    assert (queued.status, queued.background, queued.output) == ("queued", True, [])
    with pytest.raises(openai.BadRequestError) as running:
        create(client, previous_response_id=queued.id)
    assert running.value.param == "previous_response_id"
    done = wait_for(client, queued.id)
    assert (done.status, done.output_text) == ("incomplete", ANSWER.encode()[:20].decode())
    assert create(client, previous_response_id=done.id, max_output_tokens=1).output_text == "G"
    with pytest.raises(openai.BadRequestError, match="background=true and stream=true"):
        list(client.responses.retrieve(done.id, stream=True))


def test_its_events_can_be_read_again(slow_server: RunningServer) -> None:
    client = client_of(slow_server)
    stream = create(client, background=True, stream=True, max_output_tokens=30)
    response_id = next(stream).response.id
    for event in stream:
        if event.sequence_number >= 10:
            break
    stream.close()
    running: list[Any] = list(client.responses.retrieve(response_id, stream=True, starting_after=10))
    assert [event.sequence_number for event in running] == list(range(11, 11 + len(running)))
    assert running[-1].type == "response.incomplete"
    stored: list[Any] = list(client.responses.retrieve(response_id, stream=True))
    assert stored[11:] == running
    kinds = list(dict.fromkeys(event.type for event in stored))
    assert kinds == ["response.created", "response.queued", *EVENTS[1:-1], "response.incomplete"]
    assert list(client.responses.retrieve(response_id, stream=True, starting_after=5000)) == []
    text = "".join(event.delta for event in stored if event.type == "response.output_text.delta")
    assert text == stored[-1].response.output_text


def test_it_can_be_cancelled(slow_server: RunningServer) -> None:
    client = client_of(slow_server)
    options: dict[str, Any] = {"max_output_tokens": 1500, "extra_body": {"ignore_eos": True}}
    stream = create(client, background=True, stream=True, **options)
    response_id = next(stream).response.id
    wait_until(lambda: slow_server.client.stats.num_running > 0, "it never ran")
    cancelled = client.responses.cancel(response_id)
    assert cancelled.status == "cancelled"
    assert list(stream)[-1].type == "response.cancelled"
    assert client.responses.cancel(response_id) == client.responses.retrieve(response_id) == cancelled
    wait_until(lambda: slow_server.client.stats.num_blocks_used == 0, "blocks are still held")
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(create(client, max_output_tokens=1).id)


def test_deleting_one_that_runs_ends_it(slow_server: RunningServer) -> None:
    client = client_of(slow_server)
    queued = create(client, background=True, max_output_tokens=1500, extra_body={"ignore_eos": True})
    client.responses.delete(queued.id)
    assert slow_server.client.num_requests == 0
    for attempt in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            attempt(queued.id)


def test_an_engine_that_fails_is_told() -> None:
    with running_server(delay_s=0.005) as server:
        client = client_of(server)
        queued = create(client, background=True, max_output_tokens=500, extra_body={"ignore_eos": True})
        wait_until(lambda: server.client.stats.num_running > 0, "it never ran")
        server.executor.fail_next = RuntimeError("broken kernel")
        failed = wait_for(client, queued.id)
        assert (failed.status, failed.error.code) == ("failed", "engine_step_failed")


def test_what_is_stored_survives_a_restart(tmp_path: Path) -> None:
    restart_between(StoreConfig(data_dir=str(tmp_path)))


def restart_between(config: StoreConfig) -> None:
    with running_server(store=config) as server:
        client = client_of(server)
        first = create(client, "one")
        streamed: list[Any] = list(create(client, "two", background=True, stream=True))
    with running_server(store=config) as server:
        client = client_of(server)
        assert client.responses.retrieve(first.id) == first
        assert list(client.responses.retrieve(streamed[0].response.id, stream=True)) == streamed
        second = create(client, "three", previous_response_id=first.id, max_output_tokens=1)
        assert second.usage.input_tokens > first.usage.total_tokens


@contextlib.contextmanager
def child(port: int, delay_s: float, data_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.serving.child", str(port), str(delay_s), "0", str(data_dir)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline_s = time.monotonic() + 30
            while True:
                assert time.monotonic() < deadline_s
                with contextlib.suppress(httpx2.TransportError):
                    if httpx2.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                        break
                time.sleep(0.05)
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("how", ["kill", "terminate"])
def test_one_that_ran_when_the_server_died_has_failed(tmp_path: Path, how: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    with child(port, 0.05, tmp_path) as process:
        queued = create(client, background=True, max_output_tokens=1500, extra_body={"ignore_eos": True})
        assert client.responses.retrieve(queued.id).status in ("queued", "in_progress")
        getattr(process, how)()
        process.wait(20)
    with child(port, 0.0, tmp_path):
        failed = client.responses.retrieve(queued.id)
        assert (failed.status, failed.model) == ("failed", MODEL_NAME)
        assert failed.error is not None
        assert client.responses.retrieve(queued.id) == failed
