"""Servers as process trees: started, waited for, measured from /proc, ended. Linux only."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
STOP_TIMEOUT_S = 20.0

# Every server may keep its compiled modules, as an installed package has them.
AS_INSTALLED = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


class StartError(Exception):
    """The server ended, or said nothing for too long."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class ServerProcess:
    """`command` in a session of its own, its output in `log`. Use as a context manager."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        self._output = log.open("wb")
        self.started_s = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            env={**AS_INSTALLED, **environment},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the whole session: politely, then not."""
        for number, wait_s in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, STOP_TIMEOUT_S)):
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                break
            end_s = time.monotonic() + wait_s
            while time.monotonic() < end_s and self._is_alive():
                time.sleep(0.05)
        self._process.wait()
        self._output.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _is_alive(self) -> bool:
        self._process.poll()
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def wait_first_token(self, base_url: str, timeout_s: float) -> float:
        """Seconds from the start until a completion of one token was answered. Raises `StartError`."""
        while time.perf_counter() - self.started_s < timeout_s:
            if self._process.poll() is not None:
                raise StartError(f"the server ended with {self._process.returncode}: {self.last_words()}")
            try:
                body = {
                    "model": served_model(base_url),
                    "prompt": "Once upon a time",
                    "max_tokens": 1,
                    "temperature": 0,
                }
                _ask(f"{base_url}/v1/completions", body, timeout_s)
                return time.perf_counter() - self.started_s
            except urllib.error.HTTPError as error:
                if error.code not in (404, 408, 429, 500, 503):
                    raise StartError(f"HTTP {error.code}: {error.read()[:300]!r}") from error
            except OSError:
                pass
            time.sleep(0.02)
        raise StartError(f"no token within {timeout_s:.0f} s: {self.last_words()}")

    def last_words(self) -> str:
        return self._log.read_bytes()[-1500:].decode(errors="replace").strip()

    def peak_rss_mb(self) -> float:
        """Highest resident memory, summed over the processes that live now."""
        return self._sum_mb("status", "VmHWM")

    def pss_mb(self) -> float:
        """Resident now, pages that processes share counted once."""
        return self._sum_mb("smaps_rollup", "Pss")

    def _sum_mb(self, file: str, name: str) -> float:
        total_kb = 0
        for pid in process_tree(self._process.pid):
            for line in _read(f"/proc/{pid}/{file}").splitlines():
                if line.startswith(f"{name}:"):
                    total_kb += int(line.split()[1])
        return round(total_kb / 1024, 1)

    def cpu_s(self) -> float:
        """CPU time of the processes that live now."""
        return sum(_cpu_s(pid) for pid in process_tree(self._process.pid))


def served_model(base_url: str) -> str:
    """A server of one model may do without a list."""
    try:
        return str(json.loads(_ask(f"{base_url}/v1/models", None, 60.0))["data"][0]["id"])
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return "default"
        raise


def _ask(url: str, body: dict[str, Any] | None, timeout_s: float) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        content: bytes = response.read()
        return content


def process_tree(pid: int) -> list[int]:
    found = [pid]
    for task in _list(f"/proc/{pid}/task"):
        for child in _read(f"/proc/{pid}/task/{task}/children").split():
            found += process_tree(int(child))
    return list(dict.fromkeys(found))


def busy_cpu_s() -> float:
    """CPU time of everything on this machine, and what a hypervisor took."""
    ticks = [int(word) for word in _read("/proc/stat").splitlines()[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / TICKS_PER_S


def own_cpu_s() -> float:
    return _cpu_s(os.getpid())


def _cpu_s(pid: int) -> float:
    words = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / TICKS_PER_S if words else 0.0


def _list(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
