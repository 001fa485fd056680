import asyncio
from dataclasses import replace

import pytest

from pelton.bench.client import ServerClient
from pelton.bench.errors import BenchError
from pelton.bench.run import BenchPlan, BenchResult, Server, run_bench
from pelton.bench.workloads import WORKLOADS, Workload
from pelton.core.errors import ConfigError
from tests.bench.server import FakeServer, running

SMALL = replace(WORKLOADS["W4"], num_requests=6, num_clients=3, num_shared_tokens=16, num_prompt_tokens=8)


async def bench(*servers: FakeServer, workload: Workload = SMALL, passes: int = 1) -> BenchResult:
    named = [Server(name=f"s{i}", base_url=server.base_url) for i, server in enumerate(servers)]
    return await run_bench(named, BenchPlan(workloads=[workload], num_passes=passes), lambda *_: None, lambda *_: None)


@pytest.mark.parametrize("dialect", ["prompt", "content"])
async def test_prompts_have_their_exact_length(dialect: str) -> None:
    async with running(FakeServer(dialect=dialect, delay_s=0.001)) as server:
        result = await bench(server)
    measured = [body for body in server.bodies if body["max_tokens"] == SMALL.num_output_tokens]
    assert result.exact_prompts
    assert [len(server.tokens(body["prompt"])) for body in measured] == [24] * 6
    prefixes = {tuple(server.tokens(body["prompt"])[:15]) for body in measured}
    assert len(prefixes) == 1
    assert len({body["prompt"] for body in measured}) == 6
    report = result.median("W4", "s0")
    assert (report.num_prompt_tokens, report.num_output_tokens, report.num_cached_tokens) == (24 * 6, 64 * 6, 18)
    assert server.most_running == 3


async def test_same_seed_same_prompts_next_pass_others() -> None:
    async with running(FakeServer()) as server, running(FakeServer()) as other:
        await bench(server, other, passes=2)
    prompts = [[b["prompt"] for b in s.bodies if b["max_tokens"] == 64] for s in (server, other)]
    assert sorted(prompts[0]) == sorted(prompts[1])
    assert len(set(prompts[0])) == 12


async def test_servers_alternate() -> None:
    lines: list[str] = []
    async with running(FakeServer()) as a, running(FakeServer()) as b:
        servers = [Server(name="a", base_url=a.base_url), Server(name="b", base_url=b.base_url)]
        plan = BenchPlan(workloads=[SMALL], num_passes=3)
        await run_bench(servers, plan, lambda *_: None, lambda line, _report: lines.append(line))
    assert lines == ["W4 a 1/3", "W4 b 1/3", "W4 b 2/3", "W4 a 2/3", "W4 a 3/3", "W4 b 3/3"]


async def test_a_server_without_extras_is_still_measured() -> None:
    bare = FakeServer(dialect="none", takes_ignore_eos=False, reports_usage=False, lists_models=False)
    async with running(bare) as server:
        result = await bench(server)
    assert not result.exact_prompts
    assert result.ignores_eos == {"s0": False}
    assert result.models == {"s0": "default"}
    report = result.median("W4", "s0")
    assert (report.num_output_tokens, report.num_prompt_tokens, report.num_errors) == (64 * 6, 0, 0)


async def test_words_are_calibrated_by_the_servers_own_count() -> None:
    async with running(FakeServer(dialect="none")) as server:
        result = await bench(server, workload=WORKLOADS["W1"])
    assert not result.exact_prompts
    assert result.median("W1", "s0").num_prompt_tokens == pytest.approx(5 * 128, rel=0.25)


@pytest.mark.parametrize(
    ("fault", "message"),
    [("status", "HTTP 503: queue is full"), ("in_band", "engine died"), ("cut", "the stream ended before")],
)
async def test_failed_requests_are_counted(fault: str, message: str) -> None:
    async with running(FakeServer(fault=fault, fail_every=2)) as server:
        result = await bench(server)
    report = result.median("W4", "s0")
    assert 1 <= report.num_errors < 6
    assert report.first_error is not None
    assert message in report.first_error
    assert report.num_output_tokens == 64 * (6 - report.num_errors)


async def test_nothing_but_failures_is_an_error() -> None:
    async with running(FakeServer(fault="status")) as server:
        with pytest.raises(BenchError, match="every request of W4 failed; the first: HTTP 503: queue is full"):
            await bench(server)


async def test_unreachable_server() -> None:
    async with running(FakeServer()) as server:
        pass
    with pytest.raises(BenchError, match=r"http://127.0.0.1:\d+ does not answer"):
        await bench(server)


async def test_a_server_that_dies_midway_is_an_error() -> None:
    async def answer_and_die(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b'1f\r\ndata: {"choices":[{"text":"a"}]}\r\n')
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.transport.abort()

    server = await asyncio.start_server(answer_and_die, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, ServerClient(f"http://127.0.0.1:{port}") as client:
        record = await client.complete("a b", 500)
    assert record.error is not None


async def test_silence_is_a_failed_request() -> None:
    async with running(FakeServer(delay_s=0.5)) as server, ServerClient(server.base_url, timeout_s=0.05) as client:
        record = await client.complete("a b", 2)
    assert record.error == "no word within the time limit"


@pytest.mark.parametrize(("key", "message"), [(None, "HTTP 401: wrong key"), ("right", None)])
async def test_api_key(key: str | None, message: str | None) -> None:
    async with running(FakeServer(api_key="right")) as server, ServerClient(server.base_url, api_key=key) as client:
        if message is None:
            await client.prepare()
        else:
            with pytest.raises(BenchError, match=message):
                await client.prepare()


async def test_two_names_for_one_server() -> None:
    servers = [Server(name="a", base_url="http://x:1"), Server(name="b", base_url="http://x:1/")]
    with pytest.raises(ConfigError, match="two names for one server"):
        await run_bench(servers, BenchPlan(workloads=[SMALL]), lambda *_: None, lambda *_: None)
