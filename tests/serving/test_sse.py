"""Streams written through to a client that does not keep up."""

from __future__ import annotations

import asyncio
from typing import Any

from pelton.engine.client import EngineClient
from pelton.engine.thread import ThreadTransport
from pelton.serving.generation import Batch, Generation
from pelton.serving.sse import EventStream
from tests.make import make_engine, make_submission
from tests.serving.make import ANSWER, ScriptedExecutor


class TextEncoder:
    """The bare text instead of events."""

    is_finished = False

    def first(self) -> bytes:
        return b""

    def encode(self, batch: Batch) -> bytes:
        outputs = [output for _, outputs in batch for output in outputs]
        self.is_finished = any(output.finish_reason is not None for output in outputs)
        return "".join(output.text for output in outputs).encode()

    def last(self) -> bytes:
        return b""


async def stream_to(is_slow_at: range) -> tuple[bytes, int]:
    """The body, and how many sends were turned away. Like uvicorn's, `send` waits before it writes."""
    client = EngineClient(ThreadTransport(lambda: make_engine(executor=ScriptedExecutor(delay_s=0.001))), restart=False)
    await client.start()
    stream = client.submit(make_submission([1], max_tokens=100))
    body, num_calls, num_turned_away = b"", 0, 0

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def send(message: Any) -> None:
        nonlocal body, num_calls, num_turned_away
        num_calls += 1
        if num_calls in is_slow_at:
            try:
                await asyncio.sleep(0.01)
            except GeneratorExit:
                num_turned_away += 1
                raise
        body += message.get("body", b"")

    response = EventStream(Generation([stream], lambda *_: None), TextEncoder())
    async with asyncio.timeout(20):
        await response({"type": "http"}, receive, send)
    await client.close()
    return body, num_turned_away


async def test_text_is_whole_and_in_order_whoever_writes_it() -> None:
    assert await stream_to(range(0)) == (ANSWER.encode(), 0)
    body, num_turned_away = await stream_to(range(5, 12))
    assert body == ANSWER.encode()
    assert num_turned_away > 0


async def test_text_held_back_to_the_end_is_sent_with_the_last_of_it() -> None:
    body, num_turned_away = await stream_to(range(5, 1000))
    assert body == ANSWER.encode()
    assert num_turned_away > 10
