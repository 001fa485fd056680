"""The real server and model when things go wrong: each ends as promised, and the next request is served."""

from __future__ import annotations

import asyncio
import random
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.system.server import Server, completion, read_events, run_server

pytestmark = pytest.mark.model


async def test_engine_killed_clients_gone_cache_too_small(default_model_path: Path) -> None:
    flags = ("--num-kv-blocks", "48", "--max-num-seqs", "16", "--max-num-waiting", "400")
    async with run_server(default_model_path, *flags) as server:
        expected = await server.complete("def add(a, b):", max_tokens=16)
        await kill_the_engine(server)
        assert (await server.complete("def add(a, b):", max_tokens=16))["choices"] == expected["choices"]
        await lose_clients(server, 200)
        assert (await server.complete("def add(a, b):", max_tokens=16))["choices"] == expected["choices"]
        await overfill_the_cache(server)
        await exceed_the_context(server)
        await server.wait_idle()


async def kill_the_engine(server: Server) -> None:
    async def stream() -> list[dict[str, Any]]:
        body = completion("Once upon a time", max_tokens=400, stream=True)
        async with server.http.post(server.url + "/v1/completions", json=body) as response:
            assert response.status == 200
            return [event async for event in read_events(response)]

    async def whole() -> tuple[int, Any]:
        body = completion("Once upon a time", max_tokens=400)
        async with server.http.post(server.url + "/v1/completions", json=body) as response:
            return response.status, await response.json()

    streaming, waiting = asyncio.create_task(stream()), asyncio.create_task(whole())
    while await server.gauge("vllm:generation_tokens_total") < 30:
        await asyncio.sleep(0.05)
    (engine,) = server.engine_processes()
    engine.kill()
    events = await streaming
    assert events[-1]["error"]["code"] == "engine_dead"
    status, body = await waiting
    assert (status, body["error"]["code"]) == (503, "engine_dead")
    assert await server.status("/live") == 200
    assert await server.status("/ready") == 503
    async with server.http.post(server.url + "/v1/completions", json=completion("a")) as response:
        assert response.status == 503
        assert int(response.headers["Retry-After"]) >= 1
    await server.wait_ready()


async def lose_clients(server: Server, num_clients: int) -> None:
    rng = random.Random(3)

    async def vanish(index: int) -> None:
        body = completion(f"Client {index} says", max_tokens=200, stream=index % 2 == 0, n=1 + index % 2)
        patience_s = rng.uniform(0.1, 4.0)
        try:
            async with (
                asyncio.timeout(patience_s),
                server.http.post(server.url + "/v1/completions", json=body) as response,
            ):
                async for _ in read_events(response):
                    if index % 5 == 0:
                        return
        except TimeoutError:
            return

    await asyncio.gather(*map(vanish, range(num_clients)))
    await server.wait_idle()


async def overfill_the_cache(server: Server) -> None:
    """16 requests of about 110 tokens in a cache of 752: they take turns, and all of them end."""
    preemptions = await server.gauge("vllm:num_preemptions_total")
    answers = await asyncio.gather(*(server.complete(f"{index}: counting", max_tokens=100) for index in range(16)))
    assert all(answer["usage"]["completion_tokens"] == 100 for answer in answers)
    assert await server.gauge("vllm:num_preemptions_total") > preemptions
    alone = await server.complete("3: counting", max_tokens=100)
    assert alone["choices"] == answers[3]["choices"]


async def exceed_the_context(server: Server) -> None:
    for body in (completion([1] * 2000), completion([1] * 10, max_tokens=2000), completion("word " * 200_000)):
        async with server.http.post(server.url + "/v1/completions", json=body) as response:
            assert response.status == 400
            assert (await response.json())["error"]["code"] == "context_length_exceeded"


async def test_a_full_queue_and_a_drain(default_model_path: Path) -> None:
    async with run_server(
        default_model_path, "--max-num-seqs", "2", "--max-num-waiting", "3", "--drain-timeout-s", "120"
    ) as server:

        async def ask(index: int) -> int:
            body = completion(f"{index}", max_tokens=30)
            async with server.http.post(server.url + "/v1/completions", json=body) as response:
                if response.status != 200:
                    assert response.status in (429, 503)
                    assert int(response.headers["Retry-After"]) >= 1
                    assert (await response.json())["error"]["code"] == "queue_full"
                return response.status

        statuses = await asyncio.gather(*map(ask, range(20)))
        assert statuses.count(200) == 5
        assert await ask(0) == 200

        body = completion("Once upon a time", max_tokens=60, stream=True)
        async with server.http.post(server.url + "/v1/completions", json=body) as response:
            events = read_events(response)
            await anext(events)
            server.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            assert await server.status("/ready") == 503
            async with server.http.post(server.url + "/v1/completions", json=completion("late")) as refused:
                assert refused.status == 503
            rest = [event async for event in events]
        assert rest[-1]["choices"][0]["finish_reason"] == "length"
        await asyncio.wait_for(server.process.wait(), 30)
        with pytest.raises(aiohttp.ClientError):
            await server.status("/live")


async def test_a_shared_prefix_is_cached_per_tenant(default_model_path: Path) -> None:
    """A second request over the same 1,024 tokens computes only its own; another tenant shares nothing."""
    prefix = [token_id % 5000 + 1000 for token_id in range(1024)]
    async with run_server(default_model_path, "--max-num-batched-tokens", "2048") as server:

        async def num_cached(suffix: list[int], **options: Any) -> int:
            answer = await server.complete([*prefix, *suffix], max_tokens=1, **options)
            cached: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            return cached

        assert await num_cached([1, 2, 3], cache_salt="red") == 0
        assert await num_cached([4, 5, 6], cache_salt="red") == 1024
        assert await num_cached([4, 5, 6], cache_salt="blue") == 0
        computed = await server.gauge("vllm:prefix_cache_hits_total")
        assert computed == 1024
