"""The process border, client's side: `ProcessTransport`. `child.py` is the other side.

Two ZeroMQ pipes over `ipc://`, one each way. The child reads its settings as one line of JSON from
standard input and ends when that closes, so no engine outlives its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence

import msgspec
import zmq

from pelton.core.errors import EngineDeadError
from pelton.core.events import EngineInfo
from pelton.engine.child import EngineProcessArgs
from pelton.engine.wire import (
    Command,
    EngineUpdate,
    Ready,
    Shutdown,
    StartFailed,
    decode_engine_message,
    encode,
)

STOP_TIMEOUT_S = 10.0


class ProcessTransport:
    """`command` starts the child, which must call `run_engine_process`; `settings` is JSON for it."""

    def __init__(self, command: Sequence[str], settings: bytes) -> None:
        self._command = list(command)
        self._settings = settings
        self._context = zmq.Context[zmq.Socket[bytes]](io_threads=1)
        self._process: subprocess.Popen[bytes] | None = None
        self._exit: asyncio.Future[int] | None = None
        self._folder: str | None = None
        self._commands: zmq.Socket[bytes] | None = None
        self._updates: zmq.Socket[bytes] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._on_update: Callable[[EngineUpdate], None] = lambda _: None
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._is_up = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def launch(self) -> None:
        """Start the process ahead of `start`, which has no process to start then. Needs no event loop."""
        self._folder = tempfile.mkdtemp(prefix="pelton-")
        args = EngineProcessArgs(
            f"ipc://{self._folder}/commands", f"ipc://{self._folder}/updates", msgspec.Raw(self._settings)
        )
        self._commands = self._context.socket(zmq.PUSH)
        self._updates = self._context.socket(zmq.PULL)
        for pipe, address in ((self._commands, args.commands_address), (self._updates, args.updates_address)):
            pipe.set_hwm(0)  # bounded by the queue, not by the pipe
            pipe.linger = 0
            pipe.bind(address)
        # A group of its own: Ctrl-C reaches the parent alone, which then drains.
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, start_new_session=True)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already: `start` will say so
            self._process.stdin.write(msgspec.json.encode(args) + b"\n")
            self._process.stdin.flush()

    async def start(self, on_update: Callable[[EngineUpdate], None], on_exit: Callable[[str], None]) -> EngineInfo:
        if self._process is None:
            self.launch()
        assert self._process is not None
        assert self._commands is not None
        assert self._updates is not None
        self._on_update = on_update
        event_loop = asyncio.get_running_loop()
        ready: asyncio.Future[EngineInfo] = event_loop.create_future()
        self._ready = ready
        self._is_up = False
        self._exit = _watch_exit(self._process, event_loop)
        self._watch = event_loop.create_task(self._watch_process(self._exit, ready, on_exit))
        event_loop.add_reader(self._updates.fileno(), self._read_updates)
        self._read_updates()  # what came before there was a reader
        info = await ready
        await self._wait_connected(self._commands, self._process)
        self._is_up = True
        return info

    async def _wait_connected(self, commands: zmq.Socket[bytes], process: subprocess.Popen[bytes]) -> None:
        """Until the child's end of the command pipe is attached: what is sent before that is refused."""
        while not int(commands.getsockopt(zmq.EVENTS)) & zmq.POLLOUT:
            if process.poll() is not None:
                raise EngineDeadError("the engine process ended as soon as it was ready")
            await asyncio.sleep(0.001)

    async def _watch_process(
        self,
        exit: asyncio.Future[int],
        ready: asyncio.Future[EngineInfo],
        on_exit: Callable[[str], None],
    ) -> None:
        code = await asyncio.shield(exit)
        self._read_updates()  # its last words
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if not ready.done():
            ready.set_exception(EngineDeadError(f"the engine process ended before it was ready ({reason})"))
        elif self._is_up:
            on_exit(reason)

    def _read_updates(self) -> None:
        # The descriptor is edge-triggered: read until there is nothing left.
        while self._updates is not None:
            try:
                message = decode_engine_message(self._updates.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            match message:
                case EngineUpdate():
                    self._on_update(message)
                case Ready(info=info) if self._ready is not None and not self._ready.done():
                    self._ready.set_result(info)
                case StartFailed(error=error) if self._ready is not None and not self._ready.done():
                    self._ready.set_exception(error.to_error())

    def send(self, command: Command) -> None:
        if self._commands is not None:
            with contextlib.suppress(zmq.Again):  # nobody there any more: its end is about to be noticed
                self._commands.send(encode(command), zmq.NOBLOCK)

    async def stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._process is not None:
            exit = self._exit or _watch_exit(self._process, asyncio.get_running_loop())
            if self._is_up or self._has_failed():
                self.send(Shutdown())
            else:  # it takes no command yet
                self._process.kill()
            try:
                await asyncio.wait_for(asyncio.shield(exit), STOP_TIMEOUT_S)
            except TimeoutError:
                self._process.kill()
                await exit
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._process = self._exit = None
        if self._updates is not None:
            asyncio.get_running_loop().remove_reader(self._updates.fileno())
        for pipe in (self._commands, self._updates):
            if pipe is not None:
                pipe.close()
        self._commands = self._updates = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _has_failed(self) -> bool:
        """Whether the child has said why it cannot start; it ends by itself then."""
        ready = self._ready
        return ready is not None and ready.done() and not ready.cancelled() and ready.exception() is not None


def _watch_exit(process: subprocess.Popen[bytes], event_loop: asyncio.AbstractEventLoop) -> asyncio.Future[int]:
    """Its return code, once it has ended."""
    exit: asyncio.Future[int] = event_loop.create_future()

    def settle(code: int) -> None:
        if not exit.done():
            exit.set_result(code)

    def wait() -> None:
        code = process.wait()
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody asks any more
            event_loop.call_soon_threadsafe(settle, code)

    threading.Thread(target=wait, name="pelton-engine-exit", daemon=True).start()
    return exit
