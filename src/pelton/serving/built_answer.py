"""An answer that is built from deltas as they come, and sent as one JSON object at the end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pelton.serving.errors import ClientDisconnectedError, json_response
from pelton.serving.generation import Generation
from pelton.serving.sse import ChunkEncoder, cancel_on_disconnect


class BuiltAnswer(Response):
    """Reads a generation to its end into `builder`; `before_last` is awaited before what `get` returns is sent."""

    def __init__(
        self,
        generation: Generation,
        builder: ChunkEncoder,
        get: Callable[[], msgspec.Struct],
        *,
        before_last: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(media_type="application/json")
        self._generation = generation
        self._builder = builder
        self._get = get
        self._before_last = before_last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation, builder = self._generation, self._builder
        watcher = cancel_on_disconnect(generation, receive)
        try:
            while not builder.is_finished and (batch := await generation.read()) is not None:
                builder.encode(batch)
        finally:
            watcher.cancel()
            generation.close()
        if not builder.is_finished:
            raise ClientDisconnectedError
        if self._before_last is not None:
            await self._before_last()
        await json_response(self._get())(scope, receive, send)
