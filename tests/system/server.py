"""A real `pelton serve` process for tests, and a few ways to talk to it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

START_TIMEOUT_S = 120.0


@dataclass
class Server:
    url: str
    process: asyncio.subprocess.Process
    http: aiohttp.ClientSession
    log: list[str]

    def engine_processes(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "pelton.cli.engine_process" in child.cmdline()]

    async def status(self, path: str) -> int:
        async with self.http.get(self.url + path) as response:
            return response.status

    async def wait_ready(self) -> None:
        async with asyncio.timeout(START_TIMEOUT_S):
            while await self.status("/ready") != 200:
                await asyncio.sleep(0.05)

    async def complete(self, prompt: str | list[int], **options: Any) -> dict[str, Any]:
        """One completion; asserts that it succeeds."""
        async with self.http.post(self.url + "/v1/completions", json=completion(prompt, **options)) as response:
            body: dict[str, Any] = await response.json()
            assert response.status == 200, body
            return body

    async def gauge(self, name: str) -> float:
        """The sum of a metric's samples."""
        async with self.http.get(self.url + "/metrics") as response:
            text = await response.text()
        values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? ([0-9.e+-]+)$", text, re.MULTILINE)
        assert values, f"{name} is not among the metrics"
        return sum(map(float, values))

    async def wait_idle(self) -> None:
        """Until nothing runs or waits and no block is held."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        async with asyncio.timeout(60):
            # Gauges follow the engine's steps: a request makes it take one more.
            while [await self.gauge(name) for name in names] != [0, 0, 0]:
                await self.complete("a", max_tokens=1)


def completion(prompt: str | list[int], **options: Any) -> dict[str, Any]:
    return {"prompt": prompt, "temperature": 0, "max_tokens": 8, "ignore_eos": True, **options}


async def read_events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event, up to [DONE]."""
    async for line in response.content:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line[6:])


@asynccontextmanager
async def run_server(model: Path, *flags: str, env: Mapping[str, str] | None = None) -> AsyncIterator[Server]:
    """Start, wait until ready, and end; no process may be left behind. `env`: over the variables of this process."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pelton.cli.main", "serve", str(model), "--port", "0", *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | (env or {}),
    )
    log: list[str] = []
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    reading = asyncio.create_task(_read_log(process, log, url))
    try:
        server_url = await asyncio.wait_for(url, START_TIMEOUT_S)
        timeout = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as http:
            server = Server(server_url, process, http, log)
            await server.wait_ready()
            yield server
            engines = server.engine_processes() if process.returncode is None else []
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), 150)
        await reading
    assert process.returncode == 0, "".join(log)
    for engine in engines:
        assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE


async def _read_log(process: asyncio.subprocess.Process, log: list[str], url: asyncio.Future[str]) -> None:
    assert process.stdout is not None
    async for raw in process.stdout:
        line = raw.decode()
        log.append(line)
        found = re.search(r"http://[\w.\[\]:]+:\d+", line)
        if found and not url.done():
            url.set_result(found[0])
    if not url.done():
        url.set_exception(AssertionError("the server ended: " + "".join(log)))
