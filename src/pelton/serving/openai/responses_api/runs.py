"""Background responses: they run whoever listens, and whoever listens gets the events from where he likes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pelton.core.errors import PeltonError
from pelton.serving.errors import ClientDisconnectedError
from pelton.serving.generation import Generation
from pelton.serving.logs import Logger
from pelton.serving.openai.responses_api.builder import ResponseBuilder
from pelton.serving.openai.responses_api.objects import ResponseObject
from pelton.serving.sse import MAX_STALL_S, SSE_DONE, STREAM_HEADERS

_log = Logger()


class EventLog:
    """The events of a response, one by one; `wait` returns once there are more, or no more will be."""

    def __init__(self, events: list[bytes] | None = None) -> None:
        self.events = events if events is not None else []
        self.is_complete = events is not None
        self._more = asyncio.Event()

    def add(self, events: list[bytes], *, is_last: bool = False) -> None:
        self.events += events
        self.is_complete = is_last
        more, self._more = self._more, asyncio.Event()
        more.set()

    async def wait(self, num_seen: int) -> None:
        while len(self.events) <= num_seen and not self.is_complete:
            await self._more.wait()


class BackgroundRun:
    """`save` is called once, at the end, with the response and all of its events."""

    def __init__(
        self,
        tenant_id: str,
        generation: Generation,
        builder: ResponseBuilder,
        save: Callable[[ResponseObject, list[bytes]], Awaitable[None]],
        *,
        is_streamed: bool,
    ) -> None:
        self.tenant_id = tenant_id
        self.is_streamed = is_streamed
        self.builder = builder
        self.log = EventLog()
        self.log.add(builder.start())
        self._generation = generation
        self._save = save
        self._task = asyncio.create_task(self._run())

    async def cancel(self) -> None:
        """Returns once it has ended and is stored."""
        self._generation.cancel()
        await asyncio.shield(self._task)

    async def wait(self) -> None:
        await asyncio.shield(self._task)

    async def _run(self) -> None:
        try:
            last = await self._read()
        except PeltonError as error:
            last = self.builder.fail_events(error)
        except Exception:
            _log.exception("background response failed", response_id=self.builder.response.id)
            last = self.builder.fail_events(PeltonError("internal error"))
        finally:
            self._generation.close()
        try:
            await self._save(self.builder.response, [*self.log.events, *last])
        except Exception:
            # Its lease runs out, and then it counts as failed.
            _log.exception("background response is not stored", response_id=self.builder.response.id)
        self.log.add(last, is_last=True)

    async def _read(self) -> list[bytes]:
        builder, generation = self.builder, self._generation
        while not builder.is_finished and (batch := await generation.read()) is not None:
            events = builder.add(batch)
            if events:
                self.log.add(events)
        if not builder.is_finished:
            builder.settle_cancelled()
        else:
            builder.settle()
        return builder.end()


class LogStream(Response):
    """Sends the events of a log from the `start`-th on. A listener that goes away ends nothing."""

    def __init__(self, log: EventLog, start: int) -> None:
        super().__init__(media_type="text/event-stream")
        self._log = log
        self._start = start

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        sending = asyncio.create_task(self._send_all(send))
        watching = asyncio.create_task(_wait_for_disconnect(receive))
        try:
            await asyncio.wait((sending, watching), return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                raise ClientDisconnectedError
            sending.result()
        except TimeoutError:
            raise ClientDisconnectedError from None
        finally:
            sending.cancel()
            watching.cancel()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        position = self._start
        while True:
            await self._log.wait(position)
            data = b"".join(self._log.events[position:])
            position = max(position, len(self._log.events))
            is_complete = self._log.is_complete
            async with asyncio.timeout(MAX_STALL_S):
                body = data + (SSE_DONE if is_complete else b"")
                await send({"type": "http.response.body", "body": body, "more_body": not is_complete})
            if is_complete:
                return


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
