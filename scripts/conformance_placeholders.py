"""A pytest plugin for test suites that call an API with placeholders, as openai-python's does.

Those tests send every parameter at once and ask for objects that nobody made: they were written for a mock server. So
that they say something about a real one, this plugin

- puts the id of an object made for the occasion where a placeholder stands (`PLACEHOLDERS`), an `input` where a
  response has none, and the one `purpose` that the server has for files;
- takes out, one after another, the parameters that the server refuses by name with a 400, and sends again.

Both are written down for every test, with each answer of the server, as a line of JSON in `--exchange-log`. A test
that takes longer than `--test-timeout-s` fails.
"""

from __future__ import annotations

import itertools
import json
import re
import signal
import urllib.request
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import httpx2
import pytest

MAX_TAKEN_OUT = 60
BATCH_LINE = {
    "custom_id": "1",
    "method": "POST",
    "url": "/v1/responses",
    "body": {"input": "Hi", "max_output_tokens": 2},
}


@dataclass
class Exchange:
    """What a test asked and was told; `code`, `param` and `message` are those of an error."""

    method: str
    path: str
    status: int
    code: str | None = None
    param: str | None = None
    message: str | None = None


@dataclass
class Journal:
    """Of one test."""

    exchanges: list[Exchange] = field(default_factory=list)
    taken_out: list[Exchange] = field(default_factory=list)
    placed: list[str] = field(default_factory=list)


class Objects:
    """Makes what placeholders stand for; a fresh one each time, for some tests delete them."""

    _numbers = itertools.count()

    def __init__(self, url: str, adapter: str) -> None:
        self._url = url
        self._adapter = adapter

    def adapter(self) -> str:
        """The name of a loaded LoRA adapter."""
        body = {"lora_name": f"adapter-{next(self._numbers)}", "lora_path": self._adapter}
        self._post("/v1/load_lora_adapter", json.dumps(body).encode(), "application/json")
        return body["lora_name"]

    def completion(self) -> str:
        """The id of a stored chat completion."""
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "store": True}
        return str(json.loads(self._post("/v1/chat/completions", json.dumps(body).encode(), "application/json"))["id"])

    def response(self) -> str:
        """The id of a stored response whose events are kept, as only those of a streamed background one are."""
        body = {"input": "Hi", "max_output_tokens": 16, "background": True, "stream": True}
        events = self._post("/v1/responses", json.dumps(body).encode(), "application/json")
        match = re.search(rb'"id": ?"(resp_[^"]+)"', events)
        assert match is not None, events
        return match[1].decode()

    def file(self) -> str:
        edge = "placeholder-edge"
        parts = [
            f'--{edge}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n',
            f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n',
            f"{json.dumps(BATCH_LINE)}\r\n--{edge}--\r\n",
        ]
        answer = self._post("/v1/files", "".join(parts).encode(), f"multipart/form-data; boundary={edge}")
        return str(json.loads(answer)["id"])

    def batch(self) -> str:
        body = {"input_file_id": self.file(), "endpoint": "/v1/responses", "completion_window": "24h"}
        return str(json.loads(self._post("/v1/batches", json.dumps(body).encode(), "application/json"))["id"])

    def _post(self, path: str, body: bytes, content_type: str) -> bytes:
        request = urllib.request.Request(self._url + path, body, {"Content-Type": content_type})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())


# Placeholder, where it stands (a path, or a key of the body), and the method of `Objects` that makes it.
PLACEHOLDERS = (
    ("resp_677efb5139a88190b512bc3fef8e535d", "/responses/", "response"),
    ("response_id", "/responses/", "response"),
    ("previous_response_id", "previous_response_id", "response"),
    ("resp_123", "previous_response_id", "response"),
    ("completion_id", "/completions/", "completion"),
    ("ft:gpt-4o-mini:acemeco:suffix:abc123", "/models/", "adapter"),
    ("string", "/files/", "file"),
    ("string", "input_file_id", "file"),
    ("string", "/batches/", "batch"),
)


class Adapter:
    """Sits where the client sends its requests."""

    def __init__(self, url: str, adapter: str) -> None:
        self._url = url
        self._objects = Objects(url, adapter)
        self.journal = Journal()
        self.is_on = True

    def install(self, patch: pytest.MonkeyPatch) -> None:
        send, send_async = httpx2.Client.send, httpx2.AsyncClient.send

        def adapted(client: httpx2.Client, request: httpx2.Request, **options: Any) -> httpx2.Response:
            request = self.with_objects(request)
            for _ in range(MAX_TAKEN_OUT):
                response = send(client, request, **options)
                if response.status_code >= 400:
                    response.read()
                following = self.next_request(request, response)
                if following is None:
                    return response
                request = following
            raise AssertionError("too many parameters were refused")

        async def adapted_async(client: httpx2.AsyncClient, request: httpx2.Request, **options: Any) -> httpx2.Response:
            await request.aread()
            request = self.with_objects(request)
            for _ in range(MAX_TAKEN_OUT):
                response = await send_async(client, request, **options)
                if response.status_code >= 400:
                    await response.aread()
                following = self.next_request(request, response)
                if following is None:
                    return response
                request = following
            raise AssertionError("too many parameters were refused")

        patch.setattr(httpx2.Client, "send", adapted)
        patch.setattr(httpx2.AsyncClient, "send", adapted_async)

    def with_objects(self, request: httpx2.Request) -> httpx2.Request:
        if not self.is_on or not str(request.url).startswith(self._url):
            return request
        if request.method == "POST" and request.url.path.endswith("/files"):
            self.journal.placed.append("purpose")
            return with_purpose(request, b"batch")
        url, body = request.url, json_body(request)
        for placeholder, place, kind in PLACEHOLDERS:
            make: Callable[[], str] = getattr(self._objects, kind)
            if place.startswith("/") and re.search(f"{place}{placeholder}(/|$)", url.path):
                url = url.copy_with(path=url.path.replace(place + placeholder, place + make()))
            elif body is not None and body.get(place) == placeholder:
                body[place] = make()
            else:
                continue
            self.journal.placed.append(f"{place} {placeholder}")
        if body is not None and "input" not in body and url.path.endswith(("/responses", "/compact", "/input_tokens")):
            body["input"] = "Hi"
            self.journal.placed.append("input")
        return rebuilt(request, url, body) if self.journal.placed else request

    def next_request(self, request: httpx2.Request, response: httpx2.Response) -> httpx2.Request | None:
        """Writes the exchange down; the request without the parameter that was refused, if that is what happened."""
        if not self.is_on or not str(request.url).startswith(self._url):
            return None
        exchange = Exchange(request.method, request.url.path, response.status_code)
        if response.status_code >= 400:
            try:
                error = response.json()["error"]
                exchange.code, exchange.param, exchange.message = error["code"], error["param"], error["message"]
            except (ValueError, KeyError, TypeError):
                exchange.message = response.text[:300]
        following = None
        if response.status_code == 400 and exchange.param:
            following = without(request, exchange.param)
        (self.journal.exchanges if following is None else self.journal.taken_out).append(exchange)
        return following


def json_body(request: httpx2.Request) -> dict[str, Any] | None:
    if "application/json" not in request.headers.get("Content-Type", ""):
        return None
    body = json.loads(request.content or b"null")
    return body if isinstance(body, dict) else None


def rebuilt(request: httpx2.Request, url: httpx2.URL, body: dict[str, Any] | None) -> httpx2.Request:
    headers = [(name, value) for name, value in request.headers.multi_items() if name.lower() != "content-length"]
    if body is None and request.headers.get("Content-Length", "0") != "0":
        return httpx2.Request(request.method, url, headers=request.headers, stream=request.stream)
    content = None if body is None else json.dumps(body).encode()
    return httpx2.Request(request.method, url, headers=headers, content=content, extensions=request.extensions)


def with_purpose(request: httpx2.Request, purpose: bytes) -> httpx2.Request:
    """An upload; its form is rewritten as it stands."""
    content = re.sub(rb'(name="purpose"\r\n\r\n)[^\r]*', rb"\1" + purpose, request.read())
    headers = [(name, value) for name, value in request.headers.multi_items() if name.lower() != "content-length"]
    return httpx2.Request(request.method, request.url, headers=headers, content=content, extensions=request.extensions)


def without(request: httpx2.Request, param: str) -> httpx2.Request | None:
    """The request less a parameter, named as in `tools[0].strict`; None where it has none of that name."""
    body = json_body(request)
    if body is None:
        names = {name for name in request.url.params if param in (name, name.split("[")[0])}
        if not names:
            return None
        url = request.url
        for name in names:
            url = url.copy_remove_param(name)
        return rebuilt(request, url, None)
    steps = [int(step) if step.isdigit() else step for step in re.findall(r"[^.\[\]]+", param)]
    holder: Any = body
    for step in steps[:-1]:
        try:
            holder = holder[step]
        except (KeyError, IndexError, TypeError):
            return None
    try:
        del holder[steps[-1]]
    except (KeyError, IndexError, TypeError):
        return None
    return rebuilt(request, request.url, body)


class Recorder:
    def __init__(self, adapter: Adapter, log: Path, timeout_s: float) -> None:
        self._adapter = adapter
        self._log = log.open("w")
        self._timeout_s = timeout_s
        self._cause = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, None, None]:
        def too_long(_number: int, _frame: FrameType | None) -> None:
            raise TimeoutError(f"the test took more than {self._timeout_s:g} s")

        previous = signal.signal(signal.SIGALRM, too_long)
        signal.setitimer(signal.ITIMER_REAL, self._timeout_s)
        try:
            yield
        except Exception as error:
            # The client says that an answer is not of its type, and only what it stands on says where.
            self._cause = "" if error.__cause__ is None else str(error.__cause__)
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._adapter.journal = Journal()
        # Some tests answer their own requests.
        self._adapter.is_on = "respx2_mock" not in getattr(item, "fixturenames", ())
        self._cause = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        file, _, name = report.nodeid.partition("::")
        problem = ""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            problem = (crash.message if crash is not None else str(report.longrepr)).strip()
        elif report.skipped and isinstance(report.longrepr, tuple):
            problem = str(report.longrepr[-1])
        line = {
            "file": file,
            "name": name,
            "outcome": report.outcome,
            "problem": problem[:500],
            "cause": self._cause[:500],
        }
        self._log.write(json.dumps(line | asdict(self._adapter.journal)) + "\n")
        self._log.flush()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--server-url", required=True)
    parser.addoption("--adapter", required=True, help="a folder of the server's with a LoRA adapter")
    parser.addoption("--exchange-log", type=Path, required=True)
    parser.addoption("--test-timeout-s", type=float, default=30.0)


def pytest_configure(config: pytest.Config) -> None:
    adapter = Adapter(config.getoption("--server-url"), config.getoption("--adapter"))
    patch = pytest.MonkeyPatch()
    adapter.install(patch)
    config.add_cleanup(patch.undo)
    recorder = Recorder(adapter, config.getoption("--exchange-log"), config.getoption("--test-timeout-s"))
    config.pluginmanager.register(recorder, "conformance-recorder")
