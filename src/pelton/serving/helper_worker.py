"""The inside of a helper process: `python -m MODULE FD`, started by `helper_process.HelperPool`.

Reads and answers frames (length, then msgpack) on the socket FD. Whatever it works on, it does within a
limit of memory and under an alarm that ends the process.
"""

from __future__ import annotations

import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable

import msgspec

FRAME_HEADER = struct.Struct("<I")


class HelperLimits(msgspec.Struct, array_like=True):
    """The first frame; the second is the helper's own setup."""

    time_limit_s: float  # of the processor
    memory_limit_bytes: int


def read_frame(connection: socket.socket, max_bytes: int | None = None) -> bytes:
    """Raises `EOFError` where the other side is gone or sends too much, `TimeoutError` where it is slow."""
    (num_bytes,) = FRAME_HEADER.unpack(_read_exactly(connection, FRAME_HEADER.size))
    if max_bytes is not None and num_bytes > max_bytes:
        raise EOFError
    return _read_exactly(connection, num_bytes)


def _read_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    data = bytearray(num_bytes)
    view = memoryview(data)
    while view:
        num_read = connection.recv_into(view)
        if not num_read:
            raise EOFError
        view = view[num_read:]
    return bytes(data)


def write_frame(connection: socket.socket, data: bytes) -> None:
    connection.sendall(FRAME_HEADER.pack(len(data)) + data)


def run_helper(make_answerer: Callable[[bytes], Callable[[bytes], bytes]]) -> None:
    """Answer frames until the parent is gone. `make_answerer` takes the setup, outside of the time limit."""
    # The terminal's Ctrl-C goes to the whole process group; the parent decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    try:
        limits = msgspec.msgpack.decode(read_frame(connection), type=HelperLimits)
        resource.setrlimit(resource.RLIMIT_AS, (limits.memory_limit_bytes, limits.memory_limit_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        answer = make_answerer(read_frame(connection))
        while True:
            frame = read_frame(connection)
            # Of the processor's time, so that no work is refused for what else the machine does; the parent watches
            # the clock. SIGPROF's default ends the process.
            signal.setitimer(signal.ITIMER_PROF, limits.time_limit_s)
            data = answer(frame)
            signal.setitimer(signal.ITIMER_PROF, 0)
            write_frame(connection, data)
    except (EOFError, OSError):
        sys.exit(0)
