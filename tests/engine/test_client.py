"""`EngineClient` over both transports: a thread, and a real process behind ZeroMQ."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import msgspec
import pytest

from pelton.core.errors import (
    ConfigError,
    ContextLengthExceededError,
    DeadlineExceededError,
    EngineDeadError,
    EngineStepError,
    InvalidRequestError,
    QueueFullError,
    RequestCancelledError,
    ServiceUnavailableError,
)
from pelton.core.output import RequestOutput
from pelton.engine.client import EngineClient, EngineState, RequestStream
from pelton.engine.process import ProcessTransport
from pelton.engine.thread import ThreadTransport
from tests.make import ContextExecutor, generate, make_engine, make_submission
from tests.wait import is_alive

ClientFactory = Callable[..., AbstractAsyncContextManager[EngineClient]]


def thread_client(**options: Any) -> EngineClient:
    delay_s = options.pop("delay_s", 0.0)
    return EngineClient(
        ThreadTransport(lambda: make_engine(executor=ContextExecutor(delay_s=delay_s, in_thread=True), **options)),
        restart=False,
    )


def process_client(**options: Any) -> EngineClient:
    return EngineClient(ProcessTransport([sys.executable, "-m", "tests.engine.child"], msgspec.json.encode(options)))


@pytest.fixture(params=[thread_client, process_client], ids=["thread", "process"])
def started(request: pytest.FixtureRequest) -> ClientFactory:
    @asynccontextmanager
    async def start(**options: Any) -> AsyncIterator[EngineClient]:
        client = request.param(**options)
        await client.start()
        try:
            yield client
        finally:
            await client.close()

    return start


async def collect(stream: RequestStream) -> list[RequestOutput]:
    async with asyncio.timeout(60):
        return [output async for outputs in stream for output in outputs]


async def settle(client: EngineClient, *, num_running: int = 0) -> None:
    """Until the engine reports `num_running` and nothing waiting; a request nudges it to report."""
    async with asyncio.timeout(10):
        while True:
            await collect(client.submit(make_submission([1], max_tokens=1)))
            if client.stats.num_running == num_running and client.stats.num_waiting == 0:
                return


async def test_streams_agree_with_the_engine_alone(started: ClientFactory) -> None:
    submissions = [make_submission(range(index, index + 9), n=1 + index % 3) for index in range(12)]
    async with started() as client:
        all_outputs = await asyncio.gather(*(collect(client.submit(submission)) for submission in submissions))
    for submission, outputs in zip(submissions, all_outputs, strict=True):
        alone = generate(make_engine(), submission)
        for index in range(submission.sampling.n):
            own = [output for output in outputs if output.index == index]
            assert [token_id for output in own for token_id in output.token_ids] == alone[submission.request_id, index]
            assert own[-1].usage is not None
            assert own[-1].usage.num_output_tokens == 8


async def test_questions_are_answered_between_steps(started: ClientFactory) -> None:
    async with started(delay_s=0.01) as client:
        stream = client.submit(make_submission(range(9), session_id="s", tenant_id="a", tool_names=("bash",)))
        sessions, others, stats, _ = await asyncio.gather(
            client.sessions("a"), client.sessions("b"), client.tenancy(), collect(stream)
        )
        assert [(info.session_id, info.num_running) for info in sessions] == [("s", 1)]
        assert others == ()
        assert [tenant.tenant_id for tenant in stats.service] == ["a"]
        assert not await client.delete_session("b", "s")
        assert await client.delete_session("a", "s")
        assert await client.sessions("a") == ()
        assert not client._replies
    with pytest.raises(ServiceUnavailableError):
        await client.sessions("a")


async def test_a_question_to_an_engine_that_dies_is_no_question_for_ever() -> None:
    client = process_client()
    await client.start()
    transport = client._transport
    assert isinstance(transport, ProcessTransport)
    assert transport.pid is not None
    os.kill(transport.pid, signal.SIGSTOP)
    asked = asyncio.create_task(client.sessions("a"))
    await asyncio.sleep(0)
    os.kill(transport.pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        with pytest.raises(ServiceUnavailableError):
            await asked
    await client.close()


async def test_the_first_command_is_never_lost() -> None:
    """Sent the moment the engine says it is ready, while its pipe is still being attached."""
    clients = [process_client() for _ in range(8)]

    async def start_and_ask(client: EngineClient) -> int:
        await client.start()
        return len(await collect(client.submit(make_submission([1, 2]))))

    assert await asyncio.gather(*map(start_and_ask, clients)) == [8] * 8
    await asyncio.gather(*(client.close() for client in clients))


async def test_events_and_stats_reach_listeners(started: ClientFactory) -> None:
    async with started() as client:
        kinds: list[str] = []
        client.add_listener(lambda update: kinds.extend(event.kind for event in update.events))
        await collect(client.submit(make_submission(range(10))))
        assert kinds == ["queued", "scheduled", "computed", "first_token", "finished"]
        assert client.stats.num_output_tokens_total == 8
        assert client.stats.num_prompt_tokens_total == 10


async def test_cancel_frees_the_engine_at_once(started: ClientFactory) -> None:
    async with started(delay_s=0.01, max_model_len=2000, num_blocks=1000) as client:
        streams = [client.submit(make_submission([index], max_tokens=1500, n=2)) for index in range(3)]
        await anext(streams[0])
        for stream in streams:
            stream.cancel()
        assert client.num_requests == 0
        await settle(client)
        assert client.stats.num_blocks_used == 0
        assert client.stats.num_output_tokens_total < 200


async def test_queue_is_bounded(started: ClientFactory) -> None:
    async with started(delay_s=0.01, max_num_seqs=2, max_num_waiting=3) as client:
        streams = [client.submit(make_submission([1, index])) for index in range(5)]
        with pytest.raises(QueueFullError) as refused:
            client.submit(make_submission([1]))
        assert refused.value.retry_after_s >= 1
        await asyncio.gather(*map(collect, streams))
        assert len(await collect(client.submit(make_submission([1])))) > 0


async def test_deadline_ends_a_running_and_a_waiting_request(started: ClientFactory) -> None:
    async with started(delay_s=0.02, max_num_seqs=1, max_model_len=2000, num_blocks=1000) as client:
        running = client.submit(make_submission([1], max_tokens=1500, timeout_s=0.2))
        waiting = client.submit(make_submission([2], timeout_s=0.1))
        for stream in (waiting, running):
            with pytest.raises(DeadlineExceededError):
                await collect(stream)
        await settle(client)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"prompt_token_ids": []}, InvalidRequestError),
        ({"prompt_token_ids": [300]}, InvalidRequestError),
        ({"prompt_token_ids": [-1]}, InvalidRequestError),
        ({"prompt_token_ids": [1] * 256}, ContextLengthExceededError),
        ({"prompt_token_ids": [1] * 250, "max_tokens": 7}, ContextLengthExceededError),
        ({"prompt_token_ids": [1], "logit_bias": {300: 1.0}}, InvalidRequestError),
        ({"prompt_token_ids": [1], "allowed_token_ids": (-5,)}, InvalidRequestError),
        ({"prompt_token_ids": [1], "timeout_s": 0.0}, InvalidRequestError),
    ],
)
async def test_what_cannot_be_served_is_refused(options: dict[str, Any], error: type[Exception]) -> None:
    client = thread_client()
    await client.start()
    with pytest.raises(error):
        client.submit(make_submission(options.pop("prompt_token_ids"), **options))
    assert client.num_requests == 0
    await client.close()


async def test_close_drains_then_cancels(started: ClientFactory) -> None:
    async with started(delay_s=0.01, max_model_len=4000, num_blocks=2000) as client:
        short = asyncio.create_task(collect(client.submit(make_submission([1]))))
        endless = asyncio.create_task(collect(client.submit(make_submission([2], max_tokens=3000))))
        await asyncio.sleep(0)
        closing = asyncio.create_task(client.close(drain_timeout_s=0.5))
        await asyncio.sleep(0)
        with pytest.raises(ServiceUnavailableError):
            client.submit(make_submission([3]))
        assert len(await short) == 8
        with pytest.raises(RequestCancelledError):
            await endless
        await closing
        assert client.state is EngineState.STOPPED


async def test_a_failed_step_costs_only_its_requests() -> None:
    executor = ContextExecutor(in_thread=True)
    client = EngineClient(ThreadTransport(lambda: make_engine(executor=executor)), restart=False)
    await client.start()
    executor.fail_next = RuntimeError("kernel exploded")
    with pytest.raises(EngineStepError, match="kernel exploded"):
        await collect(client.submit(make_submission([1])))
    assert len(await collect(client.submit(make_submission([1])))) == 8
    assert client.stats.num_blocks_used == 0
    await client.close()


async def test_a_start_that_fails_raises_its_own_error() -> None:
    with pytest.raises(ConfigError, match="told to fail"):
        await process_client(fail=True).start()


@pytest.fixture
async def launch(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., ProcessTransport]]:
    """Starts an engine's process, for which `stop` would wait for ever."""
    monkeypatch.setattr("pelton.engine.process.STOP_TIMEOUT_S", 10**6)
    transports = []

    def launch(**options: Any) -> ProcessTransport:
        transport = ProcessTransport([sys.executable, "-m", "tests.engine.child"], msgspec.json.encode(options))
        transport.launch()
        transports.append(transport)
        return transport

    yield launch
    for transport in transports:
        if transport._process is not None:
            transport._process.kill()
        await transport.stop()


@pytest.mark.parametrize(
    ("options", "error", "code"),
    [({"hang": True}, asyncio.CancelledError, -signal.SIGKILL), ({"fail": True}, ConfigError, 1)],
    ids=["starting", "failed"],
)
async def test_an_engine_that_took_no_command_yet_is_not_waited_for(
    launch: Callable[..., ProcessTransport], options: dict[str, Any], error: type[BaseException], code: int
) -> None:
    """One that is starting hears no command to end; one that has failed ends by itself, and is let end."""
    transport = launch(**options)
    process, client = transport._process, EngineClient(transport)
    assert process is not None
    starting = asyncio.create_task(client.start())
    await asyncio.sleep(0)
    if "hang" in options:
        starting.cancel()
    async with asyncio.timeout(30):
        with pytest.raises(error):
            await starting
    assert process.returncode == code
    assert transport.pid is None
    assert client.state is EngineState.STOPPED


async def test_an_engine_that_was_launched_and_never_started_is_stopped(
    launch: Callable[..., ProcessTransport],
) -> None:
    transport = launch(hang=True)
    process = transport._process
    assert process is not None
    async with asyncio.timeout(30):
        await transport.stop()
    assert process.returncode == -signal.SIGKILL


async def test_a_killed_engine_fails_its_requests_and_comes_back() -> None:
    client = process_client(delay_s=0.01, max_model_len=4000, num_blocks=2000)
    await client.start()
    transport = client._transport
    assert isinstance(transport, ProcessTransport)
    for round_number in range(2):
        stream = client.submit(make_submission([1], max_tokens=3000))
        await anext(stream)
        assert transport.pid is not None
        os.kill(transport.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            await collect(stream)
        assert client.state is EngineState.RESTARTING
        with pytest.raises(ServiceUnavailableError):
            client.submit(make_submission([1]))
        async with asyncio.timeout(20):
            while client.state is not EngineState.READY:
                await asyncio.sleep(0.01)
        assert client.num_restarts == round_number + 1
        assert len(await collect(client.submit(make_submission([1])))) == 8
    await client.close()
    assert transport.pid is None


async def test_the_engine_ends_with_its_parent() -> None:
    code = (
        "import asyncio, sys, os, signal\n"
        "from tests.engine.test_client import process_client\n"
        "async def main():\n"
        "    client = process_client(); await client.start()\n"
        "    print(client._transport.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    await parent.wait()
    async with asyncio.timeout(10):
        while is_alive(pid):
            await asyncio.sleep(0.02)
