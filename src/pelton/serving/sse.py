"""ASGI responses fed by a `Generation`: server-sent events, and one JSON answer at the end.

Both wait for the engine's first word before they send a status, so that an early failure has one, and
both watch the connection, so that a client that goes away frees its blocks within one step. The hot
path is raw bytes, written as they arrive from the engine: no task wakes up for them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from pelton.core.errors import PeltonError
from pelton.serving.errors import ClientDisconnectedError, ErrorResponse, error_body
from pelton.serving.generation import Batch, Generation, PromptResult, add_batch, collect, empty_results

# In the scope: the server's own `send`, without the layers of middleware in between, which look at nothing
# but the start of a response.
SERVER_SEND = "pelton.server_send"
SSE_DONE = b"data: [DONE]\n\n"
# A client that keeps its connection open but has stopped reading is given up after this long.
MAX_STALL_S = 60.0
STALL_CHECK_S = 10.0
AnswerT = TypeVar("AnswerT", bound=msgspec.Struct)
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ChunkEncoder(Protocol):
    """Turns deltas into complete server-sent events."""

    is_finished: bool  # every sequence has sent its finish reason

    def first(self) -> bytes:
        """What comes before the first delta."""
        ...

    def encode(self, batch: Batch) -> bytes: ...

    def last(self) -> bytes:
        """What follows the last delta, the end mark included."""
        ...

    def fail(self, error: PeltonError) -> bytes:
        """Tells of an error after the first byte; no end mark follows, so that nobody takes the text for complete."""
        ...


def sse_event(value: object) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class KeepingEncoder:
    """Another encoder's events; `results` is what they told of."""

    def __init__(self, encoder: ChunkEncoder, num_sequences: int) -> None:
        self.first, self.last, self.fail = encoder.first, encoder.last, encoder.fail
        self.results = empty_results(1, num_sequences)
        self.is_finished = False
        self._encoder = encoder

    def encode(self, batch: Batch) -> bytes:
        add_batch(self.results, batch)
        data = self._encoder.encode(batch)
        self.is_finished = self._encoder.is_finished
        return data


class OpenAIStreamErrors:
    """How streams of chunks tell of an error."""

    def fail(self, error: PeltonError) -> bytes:
        return sse_event(ErrorResponse(error=error_body(error)))


class EventStream(Response):
    """Streams a generation as server-sent events. `before_last` is awaited once every delta is there."""

    def __init__(
        self,
        generation: Generation,
        encoder: ChunkEncoder,
        *,
        before_last: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(media_type="text/event-stream")
        self._generation = generation
        self._encoder = encoder
        self._before_last = before_last
        self._send_started_s: float | None = None
        self._stall_check: asyncio.TimerHandle | None = None
        self._is_stalled = False
        self._unsent = b""
        self._server_send: Send

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = self._generation
        watcher = cancel_on_disconnect(generation, receive)
        task = asyncio.current_task()
        assert task is not None
        self._arm_stall_check(task)
        try:
            batch = await generation.read()
            if batch is None:
                raise ClientDisconnectedError
            await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
            self._server_send = scope.get(SERVER_SEND, send)
            generation.write_through(self._write_through)
            await self._stream(batch, send)
        except asyncio.CancelledError:
            if self._is_stalled:
                raise ClientDisconnectedError from None
            raise
        finally:
            watcher.cancel()
            if self._stall_check is not None:
                self._stall_check.cancel()
            generation.close()

    async def _stream(self, batch: Batch | None, send: Send) -> None:
        generation, encoder = self._generation, self._encoder
        data = encoder.first()
        try:
            while batch is not None:
                data += self._take_unsent() + encoder.encode(batch)
                if encoder.is_finished:
                    break
                if data:
                    self._send_started_s = time.monotonic()
                    await send(_body(data))
                    self._send_started_s = None
                    data = b""
                batch = await generation.read()
            data += self._take_unsent()
            if generation.is_cancelled:
                raise ClientDisconnectedError
            if self._before_last is not None:
                await self._before_last()
            data += encoder.last()
        except PeltonError as error:
            # The status is gone already, so the error comes in band.
            data += self._take_unsent() + encoder.fail(error)
        await send(_body(data, more=False))

    def _write_through(self, batch: Batch) -> None:
        data = self._encoder.encode(batch)
        if self._unsent:
            data = self._unsent + data
        if not data or _try_send(self._server_send, data):
            self._unsent = b""
            self._send_started_s = None
        else:  # the client reads too slowly; its text is kept until it catches up or is given up
            self._unsent = data
            self._send_started_s = self._send_started_s or time.monotonic()

    def _take_unsent(self) -> bytes:
        data, self._unsent = self._unsent, b""
        return data

    def _arm_stall_check(self, task: asyncio.Task[None]) -> None:
        self._stall_check = asyncio.get_running_loop().call_later(STALL_CHECK_S, self._check_stall, task)

    def _check_stall(self, task: asyncio.Task[None]) -> None:
        started_s = self._send_started_s
        if started_s is not None and time.monotonic() - started_s > MAX_STALL_S:
            self._is_stalled = True
            task.cancel()
        else:
            self._arm_stall_check(task)


def _body(data: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


def _try_send(send: Send, data: bytes) -> bool:
    """Send without a task. False, and nothing sent, where the server would wait for the client first:
    uvicorn's `send` waits before it writes, never after."""
    sending = send(_body(data)).__await__()
    try:
        next(sending)
    except StopIteration:
        return True
    sending.close()
    return False


class CollectedAnswer(Response, Generic[AnswerT]):
    """Answers with one JSON object once a generation has ended; `keep` is awaited before it is sent."""

    def __init__(
        self,
        generation: Generation,
        num_sequences: int,
        build: Callable[[list[PromptResult]], AnswerT],
        *,
        keep: Callable[[AnswerT], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(media_type="application/json")
        self._generation = generation
        self._num_sequences = num_sequences
        self._build = build
        self._keep = keep

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = cancel_on_disconnect(self._generation, receive)
        try:
            results = await collect(self._generation, self._num_sequences)
        finally:
            watcher.cancel()
            self._generation.close()
        if results is None:
            raise ClientDisconnectedError
        answer = self._build(results)
        if self._keep is not None:
            await self._keep(answer)
        await Response(msgspec.json.encode(answer), media_type="application/json")(scope, receive, send)


def cancel_on_disconnect(generation: Generation, receive: Receive) -> asyncio.Task[None]:
    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.cancel()

    return asyncio.create_task(watch())
