"""Clients that are slow, silent, half gone, or send heads beyond all bounds; TLS; CORS."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest

from pelton.core.errors import ConfigError
from pelton.serving.config import ServerConfig
from pelton.serving.protocol import MAX_NUM_HEADERS
from pelton.serving.server import uvicorn_config
from tests.serving.make import RunningServer, running_server
from tests.wait import wait_until

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
NUM_STREAMS = 200  # fewer than may be tokenized at one time


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(config=ServerConfig(header_timeout_s=1.0, max_header_bytes=8192)) as server:
        yield server


def connect(server: RunningServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def answer_of(connection: socket.socket) -> tuple[int, str]:
    """(status, code), or (0, "") where the server just closed."""
    data = b""
    while part := connection.recv(65536):
        data += part
    if not data:
        return 0, ""
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GET /v1/models HTTP/1.1\r\nx: " + b"a" * 9000 + b"\r\n\r\n", (431, "headers_too_large")),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", (431, "headers_too_large")),
        (b"GET /v1/models HTTP/1.1\r\n" + b"a: b\r\n" * (MAX_NUM_HEADERS + 1) + b"\r\n", (431, "headers_too_large")),
        (b"GET /v1/models HTTP/1.1\r\nx: " + b"a" * 9000, (431, "headers_too_large")),  # and no end
        (b"\x16\x03\x01\x02\x00\x01", (400, "invalid_http")),
        (b"GET / HTTP/9.9\r\n\r\n", (400, "invalid_http")),
        (HEAD + b"content-length: -1\r\n\r\n", (400, "invalid_http")),
        (HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}", (400, "invalid_http")),
        (b"GET /v1/models HTTP/1.1\r\nhost: x\r\n", (408, "request_timeout")),  # and then nothing
        (b"", (0, "")),
    ],
)
def test_heads(server: RunningServer, data: bytes, expected: tuple[int, str]) -> None:
    with connect(server) as connection:
        connection.sendall(data)
        assert answer_of(connection) == expected


def test_a_head_that_drips(server: RunningServer) -> None:
    """Each byte in time does not make the head come in time."""
    with connect(server) as connection:
        started_s = time.monotonic()
        try:
            for byte in HEAD:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        except OSError:
            pass
        assert time.monotonic() - started_s < 3.5
    assert httpx2.get(f"{server.url}/live").status_code == 200


def test_a_large_body_after_a_small_head(server: RunningServer) -> None:
    body = json.dumps({"prompt": "a" * 100_000, "max_tokens": 1})
    assert httpx2.post(f"{server.url}/tokenize", content=body.replace("max_tokens", "x")).status_code == 400
    response = httpx2.post(f"{server.url}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_keep_alive_outlives_the_head_s_timeout(server: RunningServer) -> None:
    with httpx2.Client(base_url=server.url) as client:
        for _ in range(3):
            assert client.get("/live").status_code == 200
            time.sleep(0.6)


async def test_idle_streams_end_with_their_clients() -> None:
    """Many open streams that wait: the server answers others meanwhile, and keeps nothing once they are gone."""
    with running_server(delay_s=0.05, max_num_seqs=2, max_num_waiting=NUM_STREAMS) as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "abc", "max_tokens": 1900, "ignore_eos": True, "stream": True}).encode()
        request = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
        process = psutil.Process()
        used: list[int] = []
        for _ in range(3):
            connections = [await asyncio.open_connection(host, int(port)) for _ in range(NUM_STREAMS)]
            for _, writer in connections:
                writer.write(request)
            await asyncio.to_thread(wait_until, lambda: server.client.num_requests == NUM_STREAMS)
            models = await asyncio.to_thread(httpx2.get, f"{server.url}/v1/models")
            assert models.status_code == 200
            for number, (_, writer) in enumerate(connections):
                if number % 2:
                    writer.transport.abort()
                else:  # half-closed: nobody will read
                    writer.write_eof()
            await asyncio.to_thread(wait_until, lambda: server.client.num_requests == 0)
            for _, writer in connections:
                writer.close()
            used.append(process.memory_info().rss)
        assert used[2] - used[1] < 16 * 2**20
        body_of_one = {"prompt": "a", "max_tokens": 2}
        last = await asyncio.to_thread(httpx2.post, f"{server.url}/v1/completions", json=body_of_one)
        assert last.status_code == 200


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


def test_tls(certificate: tuple[str, str]) -> None:
    cert, key = certificate
    with running_server(config=ServerConfig(ssl_certfile=cert, ssl_keyfile=key)) as server:
        url = server.url.replace("http://", "https://")
        context = ssl.create_default_context(cafile=cert)
        body = {"prompt": "abc", "max_tokens": 3, "stream": True}
        with httpx2.Client(verify=context) as client:
            assert client.get(f"{url}/live").status_code == 200
            assert client.post(f"{url}/v1/completions", json=body).text.endswith("data: [DONE]\n\n")
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{server.url}/live")


def test_tls_files_that_cannot_be_used(certificate: tuple[str, str], tmp_path: Path) -> None:
    cert, key = certificate
    (tmp_path / "empty.pem").write_text("")

    async def app(*_: object) -> None: ...

    for wrong in ((cert, str(tmp_path / "none.pem")), (str(tmp_path / "empty.pem"), key), (key, cert)):
        with pytest.raises(ConfigError, match="ssl_certfile and ssl_keyfile cannot be used"):
            uvicorn_config(app, ServerConfig(ssl_certfile=wrong[0], ssl_keyfile=wrong[1]))
    with pytest.raises(ConfigError):
        ServerConfig(ssl_certfile=cert)


@pytest.mark.parametrize("origins", [(), ("https://app.example",)])
def test_cors_is_off_unless_asked_for(origins: tuple[str, ...]) -> None:
    with running_server(config=ServerConfig(cors_origins=origins)) as server:
        for origin in ("https://app.example", "https://evil.example"):
            headers = {"origin": origin, "access-control-request-method": "POST"}
            allowed = httpx2.options(f"{server.url}/v1/completions", headers=headers).headers
            assert ("access-control-allow-origin" in allowed) == (origin in origins)


def test_deep_json(server: RunningServer) -> None:
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        for depth in (100, 5000, 200_000):
            text = opening * depth + "1" + closing * depth
            for field in ("prompt", "logit_bias", "metadata", "stop"):
                content = f'{{"prompt": "a", "{field}": {text}}}'
                response = httpx2.post(
                    f"{server.url}/v1/completions", content=content, headers={"content-type": "application/json"}
                )
                assert response.status_code == 400
            chat = f'{{"messages": [{{"role": "user", "content": "a"}}], "chat_template_kwargs": {{"a": {text}}}}}'
            response = httpx2.post(
                f"{server.url}/v1/chat/completions", content=chat, headers={"content-type": "application/json"}
            )
            assert response.status_code in (200, 400)
