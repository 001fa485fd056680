"""`HelperPool`: work that a client can make endless runs in processes that can be ended (law 7).

A loop of 10^9 turns or a grammar that explodes runs in C or for ever; no thread can be stopped in the
middle of that, a process can. A call takes about 0.2 ms longer this way.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from pelton.core.errors import ServiceUnavailableError
from pelton.serving.helper_worker import HelperLimits, read_frame, write_frame

MAX_ANSWER_BYTES = 1 << 26


class HelperLimitError(Exception):
    """The helper took more time or memory than it may, and was ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HelperSpec:
    """What a pool starts. `setup` makes the first frame of its own; it is called when a helper starts."""

    module: str  # run as `python -m module FD`; it calls `helper_worker.run_helper`
    setup: Callable[[], bytes]
    work: str  # what it does, as errors call it: "every {work} helper is busy"
    time_limit_s: float
    memory_limit_bytes: int
    num_processes: int
    start_limit_s: float = 5.0  # beyond the time limit: for a start, and for a machine that is busy elsewhere


class HelperPool:
    """Thread-safe; up to `num_processes` calls at a time."""

    def __init__(self, spec: HelperSpec) -> None:
        self.spec = spec
        # None stands for a helper that is yet to be started. Last in, first out: one helper serves
        # an unhurried server, the second is started under load.
        self._idle: queue.LifoQueue[_Helper | None] = queue.LifoQueue()
        for _ in range(spec.num_processes):
            self._idle.put(None)
        self._closed = threading.Event()

    def call(self, frame: bytes) -> bytes:
        """Raises `HelperLimitError`, and `ServiceUnavailableError` where no helper is free in time."""
        timeout_s = self.spec.time_limit_s + self.spec.start_limit_s
        try:
            helper = self._idle.get(timeout=timeout_s)
        except queue.Empty:
            raise ServiceUnavailableError(f"every {self.spec.work} helper is busy; try again later") from None
        try:
            if helper is None:
                if self._closed.is_set():
                    raise ServiceUnavailableError("the server is shutting down")
                helper = _Helper(self.spec)
            return helper.call(frame, timeout_s)
        except (EOFError, OSError):
            # Killed by its own alarm, or by the kernel for want of memory.
            if helper is not None:
                helper.close()
                helper = None
            raise HelperLimitError from None
        finally:
            if self._closed.is_set() and helper is not None:
                helper.close()
                helper = None
            self._idle.put(helper)

    def close(self) -> None:
        """End the helpers; calls in progress fail."""
        self._closed.set()
        with contextlib.suppress(queue.Empty):
            while True:
                helper = self._idle.get_nowait()
                if helper is not None:
                    helper.close()


class _Helper:
    def __init__(self, spec: HelperSpec) -> None:
        setup = spec.setup()
        self._connection, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-m", spec.module, str(fd)],
                pass_fds=[fd],
                stdin=subprocess.DEVNULL,
            )
        self._connection.settimeout(spec.start_limit_s)
        limits = HelperLimits(spec.time_limit_s, spec.memory_limit_bytes)
        write_frame(self._connection, msgspec.msgpack.encode(limits))
        write_frame(self._connection, setup)

    def call(self, frame: bytes, timeout_s: float) -> bytes:
        self._connection.settimeout(timeout_s)
        write_frame(self._connection, frame)
        return read_frame(self._connection, MAX_ANSWER_BYTES)

    def close(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()
