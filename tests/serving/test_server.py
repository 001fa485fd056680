"""The server as a process: its port, its signals, its log."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

LONG: dict[str, Any] = {"prompt": "a secret prompt", "max_tokens": 1500, "ignore_eos": True, "stream": True}


@dataclass
class Child:
    process: subprocess.Popen[str]
    url: str
    log: list[str]

    def end(self) -> int:
        """The exit code; what it said meanwhile goes to the log."""
        _, rest = self.process.communicate(timeout=30)
        self.log += rest.splitlines()
        return self.process.returncode


def start(*, port: int = 0, delay_s: float = 0.0, drain_s: float = 20.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.serving.child", str(port), str(delay_s), str(drain_s)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@contextmanager
def running(**options: Any) -> Iterator[Child]:
    process = start(**options)
    try:
        assert process.stderr is not None
        child = Child(process, "", [])
        for line in process.stderr:
            child.log.append(line)
            if found := re.search(r"http://[\d.]+:(\d+)", line):
                child.url = found[0]
                assert int(found[1]) > 0
            if '"ready"' in line:
                break
        yield child
    finally:
        process.kill()
        process.wait()


def test_a_drain_finishes_what_runs_and_refuses_the_rest() -> None:
    with running(delay_s=0.005) as child, httpx2.Client(base_url=child.url, timeout=30) as http:
        with http.stream("POST", "/v1/completions", json=LONG | {"max_tokens": 300}) as response:
            lines = response.iter_lines()
            next(lines)
            child.process.send_signal(signal.SIGTERM)
            while http.get("/ready").status_code == 200:
                time.sleep(0.005)
            assert http.get("/ready").headers["retry-after"]
            assert http.get("/live").status_code == 200
            refused = http.post("/v1/completions", json={"prompt": "a"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "service_unavailable")
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert child.end() == 0
        assert any('"draining"' in line and '"num_requests": 1' in line for line in child.log)


def test_a_drain_has_an_end() -> None:
    with running(delay_s=0.02, drain_s=0.3) as child, httpx2.Client(base_url=child.url, timeout=30) as http:
        with http.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            child.process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_cancelled"
        assert child.end() == 0


def test_a_second_signal_ends_at_once() -> None:
    with running(delay_s=0.02) as child, httpx2.Client(base_url=child.url, timeout=30) as http:
        with http.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            child.process.send_signal(signal.SIGTERM)
            while http.get("/ready").status_code == 200:
                time.sleep(0.005)
            child.process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx2.HTTPError):
                list(lines)
        assert child.end() == 128 + signal.SIGTERM


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(port=port)
        _, log = process.communicate(timeout=30)
    assert process.returncode == 1
    (line,) = log.splitlines()
    assert line == f"cannot listen on 127.0.0.1 port {port}: Address already in use; choose another --host or --port"


def test_an_engine_that_does_not_start_ends_the_server() -> None:
    process = start(delay_s=-1)
    _, log = process.communicate(timeout=30)
    assert process.returncode == 1
    assert log.splitlines()[-1] == "told to fail"
    assert "Traceback" not in log


def test_idle_it_stops_quietly_and_its_log_holds_no_texts() -> None:
    headers = {"x-request-id": "mine", "x-tenant-id": "t"}
    with running() as child, httpx2.Client(base_url=child.url, timeout=30) as http:
        http.post("/v1/completions", json=LONG | {"max_tokens": 3, "user": "u"}, headers=headers)
        http.get("/live")
        child.process.send_signal(signal.SIGINT)
        assert child.end() == 0
    requests = [json.loads(line) for line in child.log if '"request"' in line]
    assert len(requests) == 1
    counts = {"num_prompt_tokens": len("a secret prompt"), "num_output_tokens": 3}
    names = {"request_id": "mine", "tenant": "t", "user": "u", "method": "POST", "path": "/v1/completions"}
    assert requests[0].items() >= (names | counts | {"event": "request", "status": 200}).items()
    assert "secret" not in "".join(child.log)
    assert "Traceback" not in "".join(child.log)
