"""The process border: `ProcessTransport` on the client's side, `run_engine_process` on the engine's.

Two ZeroMQ pipes over `ipc://`, one each way. The child reads its settings as one line of JSON from
standard input and ends when that closes, so no engine outlives its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence

import msgspec
import zmq

from pelton.core.errors import EngineDeadError, ErrorInfo, PeltonError
from pelton.core.events import EngineInfo
from pelton.engine.engine import Engine
from pelton.engine.loop import EngineLoop
from pelton.engine.wire import (
    Command,
    EngineUpdate,
    Ready,
    Shutdown,
    StartFailed,
    decode_command,
    decode_engine_message,
    encode,
)

STOP_TIMEOUT_S = 10.0


class EngineProcessArgs(msgspec.Struct, frozen=True):
    """First line of the child's standard input."""

    commands_address: str
    updates_address: str
    settings: msgspec.Raw


class ProcessTransport:
    """`command` starts the child, which must call `run_engine_process`; `settings` is JSON for it."""

    def __init__(self, command: Sequence[str], settings: bytes) -> None:
        self._command = list(command)
        self._settings = settings
        self._context = zmq.Context[zmq.Socket[bytes]](io_threads=1)
        self._process: asyncio.subprocess.Process | None = None
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

    async def start(self, on_update: Callable[[EngineUpdate], None], on_exit: Callable[[str], None]) -> EngineInfo:
        self._on_update = on_update
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
        event_loop = asyncio.get_running_loop()
        ready: asyncio.Future[EngineInfo] = event_loop.create_future()
        self._ready = ready
        event_loop.add_reader(self._updates.fileno(), self._read_updates)
        # A group of its own: Ctrl-C reaches the parent alone, which then drains.
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(args) + b"\n")
        self._is_up = False
        self._watch = event_loop.create_task(self._watch_process(self._process, ready, on_exit))
        info = await ready
        await self._wait_connected(self._commands, self._process)
        self._is_up = True
        return info

    async def _wait_connected(self, commands: zmq.Socket[bytes], process: asyncio.subprocess.Process) -> None:
        """Until the child's end of the command pipe is attached: what is sent before that is refused."""
        while not int(commands.getsockopt(zmq.EVENTS)) & zmq.POLLOUT:
            if process.returncode is not None:
                raise EngineDeadError("the engine process ended as soon as it was ready")
            await asyncio.sleep(0.001)

    async def _watch_process(
        self,
        process: asyncio.subprocess.Process,
        ready: asyncio.Future[EngineInfo],
        on_exit: Callable[[str], None],
    ) -> None:
        code = await process.wait()
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
        if self._process is not None and self._process.returncode is None:
            self.send(Shutdown())
            try:
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._process = None
        if self._updates is not None:
            asyncio.get_running_loop().remove_reader(self._updates.fileno())
        for pipe in (self._commands, self._updates):
            if pipe is not None:
                pipe.close()
        self._commands = self._updates = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def run_engine_process(build: Callable[[bytes], Engine]) -> int:
    """The child's main: `build` makes the engine from the settings. Returns the exit code."""
    args = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineProcessArgs)
    threading.Thread(target=_end_with_parent, args=(args.commands_address,), daemon=True).start()
    context = zmq.Context[zmq.Socket[bytes]](io_threads=1)
    updates = context.socket(zmq.PUSH)
    updates.set_hwm(0)
    updates.connect(args.updates_address)
    try:
        engine = build(bytes(args.settings))
    except PeltonError as error:
        updates.send(encode(StartFailed(ErrorInfo.of(error))))
        context.destroy(linger=1000)
        return 1
    loop = EngineLoop(engine, lambda update: updates.send(encode(update)))
    commands = context.socket(zmq.PULL)
    commands.set_hwm(0)
    commands.connect(args.commands_address)
    threading.Thread(target=_read_commands, args=(commands, loop), daemon=True).start()
    updates.send(encode(Ready(engine.info)))
    loop.run()
    return 0


def _read_commands(commands: zmq.Socket[bytes], loop: EngineLoop) -> None:
    while True:
        loop.put(decode_command(commands.recv()))


def _end_with_parent(address: str) -> None:
    # Unbuffered: a lock held on the buffer would break the interpreter's shutdown.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    # A parent that was killed could not tidy up; one that could has done so already.
    shutil.rmtree(os.path.dirname(address.removeprefix("ipc://")), ignore_errors=True)
    os._exit(0)
