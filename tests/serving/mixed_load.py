"""Requests of every kind against a server that is killed meanwhile, and what their clients saw of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import socket
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from pelton.store.access import AccessTables
from pelton.store.config import StoreConfig
from pelton.store.database import open_database
from pelton.store.records import Tokens
from pelton.store.usage import UsageTables

START_TIMEOUT_S = 60.0


@dataclass
class Seen:
    """By tenant. `told` is what complete answers say they have used, `delivered` the rest that came to clients."""

    num_done: Counter[str] = field(default_factory=Counter)
    told: Counter[str] = field(default_factory=Counter)
    delivered: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)


@dataclass
class Result:
    seen: Seen
    usage: dict[str, Tokens]
    engine_totals: tuple[int, int]


async def run_with_kills(
    config: StoreConfig, num_requests: int, num_kills: int, *, seed: int = 1, model: str | None = None
) -> Result:
    """The last of `num_kills` + 1 servers ends in order; each of the others is killed with requests under way.

    `model`: with `pelton serve` and its engine's process, in place of a scripted engine on a thread.
    """
    chooser = random.Random(seed)
    database = await open_database(config)
    keys = [(await AccessTables(database).create_key(tenant))[1].text for tenant in ("red", "blue")]
    await database.close()
    seen = Seen()
    each = num_requests // (num_kills + 1)
    for number in range(num_kills + 1):
        await _run_one(_command(config, model), keys, each, chooser, seen, is_killed=number < num_kills)
    database = await open_database(config)
    rows = await UsageTables(database).report(0, 1e11, by=["tenant_id"])
    totals = await UsageTables(database).engine_totals()
    await database.close()
    return Result(seen, {keys[0]: used for keys, used in rows}, totals)


def _command(config: StoreConfig, model: str | None) -> list[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    data_dir = config.data_dir or ""
    if model is None:
        script = ["-m", "tests.serving.child", port, "0.002", "30", data_dir, config.database_url or ""]
    else:
        script = ["-m", "pelton.cli.main", "serve", model, "--port", port, "--data-dir", data_dir]
    return [port, sys.executable, *script]


async def _run_one(
    command: list[str], keys: list[str], num_requests: int, chooser: random.Random, seen: Seen, *, is_killed: bool
) -> None:
    port, *arguments = command
    process = await asyncio.create_subprocess_exec(*arguments)
    url = f"http://127.0.0.1:{port}"
    kill_at = chooser.randrange(num_requests // 2, num_requests - num_requests // 8) if is_killed else num_requests + 1
    slots = asyncio.Semaphore(24)
    num_begun = 0

    async def one(number: int) -> None:
        nonlocal num_begun
        async with slots:
            num_begun += 1
            if num_begun == kill_at:
                process.send_signal(signal.SIGKILL)
            tenant = ("red", "blue")[number % 3 == 0]
            with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError):
                await _request(http, url, tenant, keys[tenant == "blue"], chooser, seen)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as http:
        await _wait_ready(http, url)
        await asyncio.gather(*map(one, range(num_requests)))
    if not is_killed:
        process.send_signal(signal.SIGTERM)
    await asyncio.wait_for(process.wait(), 60)


async def _wait_ready(http: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with http.get(url + "/ready") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.05)


async def _request(
    http: aiohttp.ClientSession, url: str, tenant: str, key: str, chooser: random.Random, seen: Seen
) -> None:
    kind = chooser.choice(("plain", "plain", "n", "prompts", "stream", "stream", "cancel", "deadline", "wrong"))
    seen.kinds[kind] += 1
    text = "".join(chooser.choices("abcdef ", k=chooser.randrange(4, 60)))
    body: dict[str, Any] = {"prompt": text, "max_tokens": chooser.randrange(1, 40), "return_token_ids": True}
    if kind == "n":
        body |= {"n": 3, "temperature": 1.0}
    elif kind == "prompts":
        body["prompt"] = [text, text[:3], text[::-1]]
    elif kind == "deadline":
        body |= {"timeout_s": 0.02, "max_tokens": 200, "ignore_eos": True}
    elif kind == "wrong":
        body["max_tokens"] = 10**6
    headers = {"authorization": f"Bearer {key}"}
    if kind in ("stream", "cancel"):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        await _stream(http, url, body, headers, tenant, seen, num_wanted=3 if kind == "cancel" else None)
        return
    async with http.post(url + "/v1/completions", json=body, headers=headers) as response:
        answer = await response.json()
        if response.status == 200:
            seen.num_done[tenant] += 1
            seen.told[tenant] += answer["usage"]["total_tokens"]


async def _stream(
    http: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    headers: dict[str, str],
    tenant: str,
    seen: Seen,
    *,
    num_wanted: int | None,
) -> None:
    num_tokens = num_told = 0
    try:
        async with http.post(url + "/v1/completions", json=body, headers=headers) as response:
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                num_tokens += sum(len(choice.get("token_ids") or ()) for choice in chunk.get("choices", ()))
                num_told = (chunk.get("usage") or {}).get("total_tokens", 0)
                if num_wanted is not None and num_tokens >= num_wanted:
                    return
    finally:
        if num_told:
            seen.num_done[tenant] += 1
            seen.told[tenant] += num_told
        else:
            seen.delivered[tenant] += num_tokens
