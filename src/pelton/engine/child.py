"""The process border, engine's side: `run_engine_process` is the child's main. `process.py` is the other side."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import zmq

from pelton.core.errors import ErrorInfo, PeltonError
from pelton.engine.wire import Ready, StartFailed, decode_command, encode

if TYPE_CHECKING:
    from pelton.engine.engine import Engine
    from pelton.engine.loop import EngineLoop


class EngineProcessArgs(msgspec.Struct, frozen=True):
    """First line of the child's standard input."""

    commands_address: str
    updates_address: str
    settings: msgspec.Raw


def run_engine_process(build: Callable[[bytes], Engine]) -> int:
    """The child's main: `build` makes the engine from the settings. Returns the exit code."""
    args = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineProcessArgs)
    threading.Thread(target=_end_with_parent, args=(args.commands_address,), daemon=True).start()
    context = zmq.Context[zmq.Socket[bytes]](io_threads=1)
    updates = context.socket(zmq.PUSH)
    updates.set_hwm(0)
    updates.connect(args.updates_address)
    # Much is made at the start that lives as long as the process: no search for garbage in it, now or later.
    gc.disable()
    try:
        engine = build(bytes(args.settings))
    except PeltonError as error:
        updates.send(encode(StartFailed(ErrorInfo.of(error))))
        context.destroy(linger=1000)
        return 1
    from pelton.engine.loop import EngineLoop

    loop = EngineLoop(engine, lambda update: updates.send(encode(update)))
    commands = context.socket(zmq.PULL)
    commands.set_hwm(0)
    commands.connect(args.commands_address)
    threading.Thread(target=_read_commands, args=(commands, loop), daemon=True).start()
    gc.freeze()
    gc.enable()
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
