"""`ThreadTransport`: the engine on a thread of this process, for `LLM` and tests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from pelton.core.errors import EngineDeadError, PeltonError
from pelton.core.events import EngineInfo
from pelton.engine.engine import Engine
from pelton.engine.loop import EngineLoop
from pelton.engine.wire import Command, EngineUpdate


class ThreadTransport:
    """`build` makes the engine, on its thread: loading a model there leaves the event loop free."""

    def __init__(self, build: Callable[[], Engine]) -> None:
        self._build = build
        self._thread: threading.Thread | None = None
        self._loop: EngineLoop | None = None

    async def start(self, on_update: Callable[[EngineUpdate], None], on_exit: Callable[[str], None]) -> EngineInfo:
        event_loop = asyncio.get_running_loop()
        ready: asyncio.Future[EngineInfo] = event_loop.create_future()

        def settle(info: EngineInfo | None, error: Exception | None) -> None:
            if ready.done():
                return
            if info is not None:
                ready.set_result(info)
            else:
                ready.set_exception(error or EngineDeadError("the engine did not start"))

        def run() -> None:
            try:
                engine = self._build()
                self._loop = EngineLoop(engine, lambda update: _call(event_loop, on_update, update))
            except Exception as error:
                if not isinstance(error, PeltonError):
                    error = EngineDeadError(f"the engine did not start: {type(error).__name__}: {error}")
                _call(event_loop, settle, None, error)
                return
            _call(event_loop, settle, engine.info, None)
            try:
                self._loop.run()
            except Exception as error:
                _call(event_loop, on_exit, f"{type(error).__name__}: {error}")
                raise

        self._thread = threading.Thread(target=run, name="pelton-engine", daemon=True)
        self._thread.start()
        return await ready

    def send(self, command: Command) -> None:
        if self._loop is not None:
            self._loop.put(command)

    async def stop(self) -> None:
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self._thread = self._loop = None


def _call(event_loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> None:
    """Run on the event loop; after its end nobody listens."""
    if not event_loop.is_closed():
        event_loop.call_soon_threadsafe(function, *args)
