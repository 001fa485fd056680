"""/v1/files and /v1/batches through the official client: bounds, damage, tenants, cancelling, kill -9 and restart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
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

from pelton.serving.batches.results import ResultFile
from pelton.serving.config import ServerConfig
from tests.serving.keys import admin, key_server, new_key, store_at
from tests.serving.make import ANSWER, MODEL_NAME, RunningServer, running_server

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


def line(custom_id: Any, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": MODEL_NAME} | body}


def jsonl(lines: list[Any]) -> bytes:
    return "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines).encode()


def client_of(url: str, tenant: str = "default") -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, default_headers={"X-Tenant-Id": tenant}, timeout=30
    )


def start(client: openai.OpenAI, content: bytes, endpoint: Any = COMPLETIONS, **options: Any) -> Any:
    file = client.files.create(file=("input.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, **({"completion_window": "24h"} | options))


def wait(client: openai.OpenAI, batch_id: str, *statuses: str) -> Any:
    deadline_s = time.monotonic() + 30
    while (batch := client.batches.retrieve(batch_id)).status not in statuses:
        assert time.monotonic() < deadline_s, batch
        assert batch.status in ("validating", "in_progress", "finalizing", "cancelling"), batch
        time.sleep(0.05)
    return batch


def results(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    return [json.loads(one) for one in client.files.content(file_id).text.splitlines()] if file_id else []


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    config = ServerConfig(max_batch_lines=50, max_file_bytes=100_000, max_stored_bytes=1_000_000)
    with running_server(config=config, data_dir=tmp_path_factory.mktemp("data")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return client_of(server.url)


def test_a_file_comes_and_goes(client: openai.OpenAI) -> None:
    content = jsonl([line("a", prompt="x")])
    file = client.files.create(
        file=("näme.jsonl", content), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", len(content), "näme.jsonl", "batch")
    assert file.expires_at is not None
    assert file.expires_at - file.created_at == 3600
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).content == content
    assert file.id in [other.id for other in client.files.list(purpose="batch")]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)


def test_pages(server: RunningServer) -> None:
    client = client_of(server.url, "pages")
    ids = [client.files.create(file=(f"{index}", b"x"), purpose="batch").id for index in range(5)]
    assert [file.id for file in client.files.list(limit=2)] == ids[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == ids
    assert [file.id for file in client.files.list(after=ids[3], order="asc").data] == ids[4:]
    made = [start(client, jsonl([line("a", prompt="x", max_tokens=1)])).id for _ in range(3)]
    assert [batch.id for batch in client.batches.list(limit=2)] == made[::-1]


@pytest.mark.parametrize(
    ("endpoint", "body", "check"),
    [
        (COMPLETIONS, {"prompt": "a", "max_tokens": 100}, lambda body: body["choices"][0]["text"] == ANSWER),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "a"}]},
            lambda body: body["choices"][0]["message"]["content"] == ANSWER,
        ),
        ("/v1/responses", {"input": "a"}, lambda body: body["output"][0]["content"][0]["text"] == ANSWER),
        (EMBEDDINGS, {"input": "abc"}, lambda body: len(body["data"][0]["embedding"]) == 4),
    ],
)
def test_every_line_is_answered_once(client: openai.OpenAI, endpoint: str, body: dict[str, Any], check: Any) -> None:
    lines = [line(f"line-{index}", endpoint, **body) for index in range(20)]
    batch = start(client, jsonl(lines), endpoint, metadata={"who": "me"})
    assert (batch.status, batch.object, batch.metadata) == ("validating", "batch", {"who": "me"})
    batch = wait(client, batch.id, "completed")
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (20, 20, 0)
    assert batch.error_file_id is None
    assert batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    found = results(client, batch.output_file_id)
    assert sorted(one["custom_id"] for one in found) == sorted(one["custom_id"] for one in lines)
    for one in found:
        assert one["error"] is None
        assert one["response"]["status_code"] == 200
        assert one["response"]["request_id"]
        assert check(one["response"]["body"])
    assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def test_each_bad_line_is_an_error_line(client: openai.OpenAI) -> None:
    good = line("good", prompt="a", max_tokens=2)
    bad: list[tuple[Any, str | None, str]] = [
        ("{not json", None, "invalid_json"),
        ("[1, 2]", None, "invalid_type"),
        ("null", None, "invalid_type"),
        ('"' + "\\ud800" + '"', None, "invalid_json"),
        (line(None, prompt="a"), None, "invalid_type"),
        (line(7, prompt="a"), None, "invalid_type"),
        (line("", prompt="a"), "", "invalid_value"),
        (line("good", prompt="b"), "good", "duplicate_custom_id"),
        (line("m", prompt="a") | {"method": "GET"}, "m", "invalid_method"),
        (line("u", CHAT, prompt="a"), "u", "mismatched_url"),
        (line("x", prompt="a") | {"extra": 1}, "x", "unknown_parameter"),
        (line("s", prompt="a", stream=True), "s", "invalid_value"),
        ({"custom_id": "n", "method": "POST", "url": COMPLETIONS}, "n", "missing_required_parameter"),
        ("[" * 5000, None, "invalid_type"),
    ]
    refused = line("temperature", prompt="a", temperature=-1)
    unknown_model = line("model", prompt="a") | {"body": {"model": "other", "prompt": "a"}}
    big = line("big", prompt="a", seed=10**30)
    deep = json.dumps(line("deep", prompt="@")).replace('"@"', "[" * 800 + "]" * 800)
    content = jsonl([good, "", *(one for one, _, _ in bad), "  ", refused, unknown_model, big, deep])
    batch = wait(client, start(client, content).id, "completed")
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (len(bad) + 5, 1, len(bad) + 4)
    assert [one["custom_id"] for one in results(client, batch.output_file_id)] == ["good"]
    errors = results(client, batch.error_file_id)
    assert [(one["custom_id"], one["error"]["code"]) for one in errors[: len(bad)]] == [one[1:] for one in bad]
    assert [one["error"]["line"] for one in errors[: len(bad)]] == list(range(3, 3 + len(bad)))
    assert {one["custom_id"]: one["response"]["status_code"] for one in errors[len(bad) :]} == {
        "temperature": 400,
        "model": 404,
        "big": 400,
        "deep": 400,
    }


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty_file"),
        (b"\n \n", "empty_file"),
        (jsonl([line(str(index), prompt="a") for index in range(51)]), "too_many_lines"),
    ],
)
def test_a_file_that_cannot_be_run(client: openai.OpenAI, content: bytes, code: str) -> None:
    batch = wait(client, start(client, content).id, "failed")
    assert batch.errors.data[0].code == code
    assert batch.output_file_id is batch.error_file_id is None


def test_any_bytes_are_survived(client: openai.OpenAI) -> None:
    batch = wait(client, start(client, bytes(range(256)) * 20).id, "completed")
    assert batch.request_counts.completed == 0
    assert batch.request_counts.failed == len(results(client, batch.error_file_id)) > 0


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"endpoint": "/v1/models"}, "endpoint"),
        ({"endpoint": "/v1/batches"}, "endpoint"),
        ({"completion_window": "2 days"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"input_file_id": "../pelton.db"}, "input_file_id"),
        ({"metadata": {"a": 1}}, "metadata[...]"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
    ],
)
def test_what_a_batch_is_checked_for(client: openai.OpenAI, server: RunningServer, options: Any, param: str) -> None:
    file = client.files.create(file=("a", jsonl([line("a", prompt="a")])), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": COMPLETIONS, "completion_window": "24h"} | options
    response = httpx2.post(f"{server.url}/v1/batches", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("files", "data", "status", "param"),
    [
        ({"file": ("a", b"x")}, {}, 400, "purpose"),
        ({"file": ("a", b"x")}, {"purpose": "fine-tune"}, 400, "purpose"),
        ({"file": ("a", b"x")}, {"purpose": "batch", "other": "1"}, 400, "other"),
        ({"other": ("a", b"x")}, {"purpose": "batch"}, 400, "other"),
        ({"file": ("a" * 300, b"x")}, {"purpose": "batch"}, 400, "file"),
        ({"file": ("a", b"x")}, {"purpose": "batch", "expires_after[anchor]": "now"}, 400, "expires_after[anchor]"),
        ({"file": ("a", b"x" * 100_001)}, {"purpose": "batch"}, 413, None),
        ({"file": ("a", b"x" * 5_000_000)}, {"purpose": "batch"}, 413, None),
    ],
)
def test_uploads_are_bounded(server: RunningServer, files: Any, data: Any, status: int, param: str | None) -> None:
    response = httpx2.post(f"{server.url}/v1/files", files=files, data=data, headers={"X-Tenant-Id": "bounds"})
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param
    assert client_of(server.url, "bounds").files.list().data == []


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"{}", "application/json"),
        (b"x", "multipart/form-data"),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--", "multipart/form-data; boundary=b"),
        (b"--b\r\n", "multipart/form-data; boundary=b"),
        (b"garbage", "multipart/form-data; boundary=b"),
    ],
)
def test_damaged_forms(server: RunningServer, content: bytes, content_type: str) -> None:
    response = httpx2.post(f"{server.url}/v1/files", content=content, headers={"content-type": content_type})
    assert response.status_code in (400, 415), response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_tenants_files_are_bounded(server: RunningServer) -> None:
    client = client_of(server.url, "greedy")
    for _ in range(10):
        client.files.create(file=("a", b"x" * 95_000), purpose="batch")
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("a", b"x" * 95_000), purpose="batch")
    assert (caught.value.status_code, caught.value.code) == (413, "storage_exceeded")


def test_tenants_do_not_see_each_other(server: RunningServer) -> None:
    one, other = client_of(server.url, "one"), client_of(server.url, "other")
    batch = start(one, jsonl([line("a", prompt="secret", max_tokens=1)]))
    done = wait(one, batch.id, "completed")
    for file_id in (done.input_file_id, done.output_file_id):
        for call in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(file_id)
    for call in (other.batches.retrieve, other.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            call(batch.id)
    with pytest.raises(openai.BadRequestError):
        other.batches.create(input_file_id=done.input_file_id, endpoint=COMPLETIONS, completion_window="24h")
    assert list(other.files.list()) == list(other.batches.list()) == []
    salts = {r.context.prompt_token_ids for batch in server.executor.batches for r in batch.requests if r.context}
    assert tuple(b"secret") in salts  # it did run


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(
        delay_s=0.01, data_dir=tmp_path_factory.mktemp("slow"), config=ServerConfig(batch_concurrency=2)
    ) as server:
        yield server


def test_cancelling_keeps_what_is_done(slow: RunningServer) -> None:
    client = client_of(slow.url)
    batch = start(client, jsonl([line(str(index), prompt="a", max_tokens=20) for index in range(40)]))
    while client.batches.retrieve(batch.id).request_counts.completed < 2:
        time.sleep(0.05)
    with pytest.raises(openai.ConflictError):
        client.files.delete(batch.input_file_id)
    assert client.batches.cancel(batch.id).status == "cancelling"
    done = wait(client, batch.id, "cancelled")
    assert done.cancelled_at >= done.cancelling_at
    found = results(client, done.output_file_id)
    assert 2 <= len(found) == done.request_counts.completed < 40
    assert slow.client.num_requests == 0
    assert client.batches.cancel(batch.id).status == "cancelled"
    client.files.delete(batch.input_file_id)


def test_what_is_unfinished_expires(slow: RunningServer) -> None:
    client = client_of(slow.url)
    content = jsonl([line(str(index), prompt="a", max_tokens=20) for index in range(40)])
    done = wait(client, start(client, content, completion_window="1s").id, "expired")
    outputs, errors = results(client, done.output_file_id), results(client, done.error_file_id)
    ids = [one["custom_id"] for one in (*outputs, *errors)]
    assert sorted(ids, key=int) == [str(index) for index in range(40)]
    assert {one["error"]["code"] for one in errors if one["error"]} == {"batch_expired"}
    assert slow.client.num_requests == 0


def test_interactive_requests_go_first(slow: RunningServer) -> None:
    """While one is answered, the lines get few of the steps."""
    client = client_of(slow.url)
    batch = start(client, jsonl([line(str(index), prompt="ab", max_tokens=50, ignore_eos=True) for index in range(8)]))
    while client.batches.retrieve(batch.id).status != "in_progress" or not slow.client.num_requests:
        time.sleep(0.02)
    first = len(slow.executor.batches)
    answer = client.completions.create(model=MODEL_NAME, prompt="quick", max_tokens=40)
    steps = slow.executor.batches[first:]
    own = [step for step in steps if any(r.request_id == answer.id for r in step.requests)]
    mixed = [step for step in own if len(step.requests) > 1]
    assert len(own) >= 40
    assert 0 < len(mixed) <= len(own) // 4
    wait(client, batch.id, "completed")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def server_process(
    data_dir: Path, delay_s: float, database_url: str = ""
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serving.child", str(port), str(delay_s), "0", str(data_dir), database_url]
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline_s = time.monotonic() + 30
        while True:
            with contextlib.suppress(httpx2.HTTPError):
                if httpx2.get(f"{url}/ready").status_code == 200:
                    break
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        yield url, process
    finally:
        process.kill()
        process.wait()


def test_kill_9_and_restart(tmp_path: Path) -> None:
    """Twice in a batch: every line is in the outputs exactly once, bad ones too."""
    kill_and_restart(tmp_path)


def kill_and_restart(tmp_path: Path, database_url: str = "") -> None:
    lines: list[Any] = [line(f"l{index}", prompt="a", max_tokens=12) for index in range(60)]
    lines[7:7] = ["{", line("bad", prompt="a", temperature=9e9)]
    batch_id, num_before = "", 0
    for _ in range(2):
        with server_process(tmp_path, 0.01, database_url) as (url, process):
            client = client_of(url, "agent")
            batch_id = batch_id or start(client, jsonl(lines)).id
            deadline_s = time.monotonic() + 30
            while (counts := client.batches.retrieve(batch_id).request_counts).completed < num_before + 8:
                assert time.monotonic() < deadline_s
                time.sleep(0.02)
            num_before = counts.completed
            process.send_signal(signal.SIGKILL)
            process.wait()
        partial = max((tmp_path / "files").glob("file-*"), key=lambda path: path.stat().st_mtime)
        with partial.open("ab") as file:  # as if the last line had been half written
            file.write(b'{"id": "batch_req_x_1", "custom')
    with server_process(tmp_path, 0.0, database_url) as (url, _):
        client = client_of(url, "agent")
        done = wait(client, batch_id, "completed")
        outputs, errors = results(client, done.output_file_id), results(client, done.error_file_id)
    assert sorted(one["custom_id"] for one in outputs) == sorted(f"l{index}" for index in range(60))
    assert sorted(str(one["custom_id"]) for one in errors) == ["None", "bad"]
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (62, 60, 2)


def test_a_result_file_is_cut_to_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "results"
    whole = b'{"id":"batch_req_a_1"}\n{"id":"batch_req_a_5"}\n'
    for rest in (b"", b'{"id":"batch_req_a_6"}', b"\0\0\0\0\n", b'{"id":7}\n', b'{"id":"x"}\n'):
        path.write_bytes(whole + rest)
        assert ResultFile(path).recover() == {1, 5}
        assert path.read_bytes() == whole


async def test_a_batch_runs_on_the_key_that_made_it(tmp_path: Path) -> None:
    """Its tokens are the key's; once that is revoked, what is left is refused; another tenant's key sees nothing."""
    config = store_at(tmp_path)
    key_id, key = await new_key(config, "acme")
    _, other_key = await new_key(config, "other")

    def run() -> None:
        with key_server(config, delay_s=0.005) as server:
            client = client_of(server.url, "acme").with_options(api_key=key)
            batch = start(client, jsonl([line("a", prompt="abcd", max_tokens=3), line("b", prompt="ab", max_tokens=3)]))
            assert wait(client, batch.id, "completed").request_counts.completed == 2
            usage = admin(server, "GET", "/usage", params={"group_by": "key"}).json()["data"]
            assert [(row["num_prompt_tokens"], row["num_output_tokens"]) for row in usage] == [(6, 6)]
            with pytest.raises(openai.NotFoundError):
                client_of(server.url, "other").with_options(api_key=other_key).batches.retrieve(batch.id)
            batch = start(client, jsonl([line(str(index), prompt="a", max_tokens=40) for index in range(60)]))
            while client.batches.retrieve(batch.id).request_counts.completed < 3:
                time.sleep(0.02)
            assert admin(server, "DELETE", f"/keys/{key_id}").status_code == 200
            made = admin(server, "POST", "/keys", json={"tenant_id": "acme"}).json()["key"]
            client = client_of(server.url, "acme").with_options(api_key=made)
            done = wait(client, batch.id, "completed")
            assert done.request_counts.completed + done.request_counts.failed == 60
            statuses = {one["response"]["status_code"] for one in results(client, done.error_file_id)}
            assert statuses == {401}

    await asyncio.to_thread(run)
