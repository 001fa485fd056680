"""Idle streams in great number against `pelton serve`: what the server needs for them, and what is left afterwards.

    benchmarks/many_streams.py MODEL [--num-streams 5000] [--rounds 3]

One request runs and the rest wait, each with its stream open. Between the rounds all clients go, half of them without a
word. Prints the memory of the server's processes and how long another client waits for an answer meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import resource
import statistics
import sys
import time
from collections.abc import Awaitable, Callable

import psutil

HEAD = "{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def main() -> None:
    arguments = _parse()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    flags = (
        "--port",
        "0",
        "--max-num-seqs",
        "1",
        "--max-num-waiting",
        str(arguments.num_streams),
        "--log-level",
        "info",
    )
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pelton.cli.main", "serve", arguments.model, *flags, *arguments.flags),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        port = await _port(server)
        drain = asyncio.create_task(_drain(server))
        await _until(lambda: _is_ready(port))
        _show("before", server.pid, await _gauges(port))
        for number in range(1, arguments.rounds + 1):
            await _round(number, server.pid, port, arguments.num_streams)
    finally:
        server.terminate()
        await server.wait()
    drain.cancel()


async def _until(is_so: Callable[[], Awaitable[bool]]) -> None:
    while not await is_so():  # noqa: ASYNC110 - another process has no event to wait for
        await asyncio.sleep(0.1)


async def _is_ready(port: int) -> bool:
    return b" 200 " in await _ask(port, "GET", "/ready")


async def _holds(port: int, num_requests: int) -> bool:
    return sum(await _gauges(port)) == num_requests


async def _round(number: int, pid: int, port: int, num_streams: int) -> None:
    body = json.dumps({"prompt": "Once", "max_tokens": 1000, "ignore_eos": True, "stream": True, "timeout_s": 3600})
    request = HEAD.format(method="POST", path="/v1/completions", length=len(body)).encode() + body.encode()
    connections: list[Connection] = []
    started_s = time.perf_counter()
    for _ in range(num_streams):
        connection = await asyncio.open_connection("127.0.0.1", port)
        connection[1].write(request)
        connections.append(connection)
    await _until(lambda: _holds(port, num_streams))
    _show(
        f"round {number}: {num_streams} streams after {time.perf_counter() - started_s:.1f} s", pid, await _gauges(port)
    )
    times_ms = []
    for _ in range(20):
        started_s = time.perf_counter()
        assert b" 200 " in await _ask(port, "GET", "/v1/models")
        times_ms.append(1000 * (time.perf_counter() - started_s))
    print(
        f"  another client's GET /v1/models: median {statistics.median(times_ms):.1f} ms, most {max(times_ms):.1f} ms"
    )
    started_s = time.perf_counter()
    for index, (_, writer) in enumerate(connections):
        writer.transport.abort() if index % 2 else writer.close()
    await _until(lambda: _holds(port, 0))
    _show(f"round {number}: all gone after {time.perf_counter() - started_s:.1f} s", pid, await _gauges(port))


def _show(title: str, pid: int, gauges: tuple[float, float]) -> None:
    process = psutil.Process(pid)
    api = process.memory_info().rss / 2**20
    children = sum(child.memory_info().rss for child in process.children(recursive=True)) / 2**20
    print(
        f"{title}\n  running {gauges[0]:.0f}, waiting {gauges[1]:.0f}; "
        f"API process {api:.0f} MiB, engine {children:.0f} MiB"
    )


async def _gauges(port: int) -> tuple[float, float]:
    text = (await _ask(port, "GET", "/metrics")).decode()
    found = [
        re.search(rf"^vllm:num_requests_{name}{{.*}} (\S+)$", text, re.MULTILINE) for name in ("running", "waiting")
    ]
    return (float(found[0][1]), float(found[1][1])) if found[0] and found[1] else (0.0, 0.0)


async def _ask(port: int, method: str, path: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        HEAD.format(method=method, path=path, length=0).replace("host: x", "host: x\r\nconnection: close").encode()
    )
    data = await reader.read()
    writer.close()
    return data


async def _port(server: asyncio.subprocess.Process) -> int:
    assert server.stderr is not None
    async for line in server.stderr:
        found = re.search(rb"http://127.0.0.1:(\d+)", line)
        if found:
            return int(found[1])
    raise SystemExit("the server ended")


async def _drain(server: asyncio.subprocess.Process) -> None:
    assert server.stderr is not None
    with contextlib.suppress(asyncio.CancelledError):
        async for _ in server.stderr:
            pass


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--num-streams", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("flags", nargs="*", help="further flags of `pelton serve`, after --")
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main())
