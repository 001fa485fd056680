"""A real HTTP server for one test: files with Range support, and ways to misbehave."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class ModelServer:
    """`files`: path -> content. `requests` logs (method, path, Range header)."""

    port: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    answers: dict[str, tuple[int, bytes]] = field(default_factory=dict)  # path -> status and body, instead of a file
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    ranges: bool = True
    etag: bool = True
    break_after: list[int] = field(default_factory=list)  # bytes sent before the connection ends, one per request
    delay_s: float = 0.0  # between chunks of 64 KiB

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def ranges_asked(self) -> list[str | None]:
        return [asked for method, _, asked in self.requests if method == "GET"]

    def add_hub_model(self, repo_id: str, files: dict[str, bytes], commit: str = "0" * 40) -> None:
        """The few routes that huggingface_hub asks for."""
        siblings = [
            {
                "rfilename": name,
                "size": len(content),
                "blobId": "0",
                "lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1},
            }
            for name, content in files.items()
        ]
        info = json.dumps({"id": repo_id, "sha": commit, "siblings": siblings}).encode()
        for path in (f"/api/models/{repo_id}", f"/api/models/{repo_id}/revision/main"):
            self.answers[path] = (200, info)
        for name, content in files.items():
            self.files[f"/{repo_id}/resolve/{commit}/{name}"] = content


@contextlib.contextmanager
def serve_models() -> Iterator[ModelServer]:
    server = ModelServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            asked = self.headers.get("Range")
            server.requests.append((self.command, path, asked))
            if path in server.answers or path not in server.files:
                status, body = server.answers.get(path, (404, b"no such file"))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                if status == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.end_headers()
                self.wfile.write(body if with_body else b"")
                return
            content = server.files[path]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            unchanged = self.headers.get("If-Range") in (None, etag)
            start = int(asked.removeprefix("bytes=").split("-")[0]) if asked and server.ranges and unchanged else 0
            if start >= len(content) > 0:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("X-Repo-Commit", "0" * 40)
            if server.etag:
                self.send_header("ETag", etag)
            self.end_headers()
            if with_body:
                self.send_body(content[start:])

        def send_body(self, body: bytes) -> None:
            stop = server.break_after.pop(0) if server.break_after else len(body)
            for at in range(0, min(stop, len(body)), 1 << 16):
                self.wfile.write(body[at : min(stop, at + (1 << 16))])
                time.sleep(server.delay_s)
            if stop < len(body):
                self.wfile.flush()
                self.close_connection = True

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http_server.daemon_threads = True
    server.port = http_server.server_port
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http_server.shutdown()
        http_server.server_close()
