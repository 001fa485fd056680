"""The processes of the ranks but the first, as that one sees them: `rank_process.py` is their main."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import IO, TypeVar

from pelton.core.errors import ConfigError, PeltonError

Outcome = tuple[int, int]

LENGTH = struct.Struct("<I")
OUTCOME = struct.Struct("<qiI")  # step id; 1 or, where it raised, 0; checksum of the tokens
CLOSE_S = 10.0
_LOOK_S = 0.05
# A rank whose neighbour is lost may notice before the system says so.
_NOTICE_S = 2.0
_NUM_LAST_LINES = 5
_MAX_LINE = 500  # characters
_STANDARD_ERROR = 2

T = TypeVar("T")


class OtherRank:
    """A rank in a process of its own, which `sharded.serve_rank` is the main of."""

    def __init__(self, rank: int, settings: bytes) -> None:
        """Starts it; `wait_until_ready` before anything is sent."""
        self.rank = rank
        command = [sys.executable, "-m", "pelton.worker.executors.rank_process"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._commands: IO[bytes] = self._process.stdin
        self._answers: IO[bytes] = self._process.stdout
        self._last_lines: deque[str] = deque(maxlen=_NUM_LAST_LINES)
        self._echo = threading.Thread(target=self._pass_on, args=(self._process.stderr,), daemon=True)
        self._echo.start()
        with contextlib.suppress(BrokenPipeError):  # it has ended already: `wait_until_ready` will say so
            self._commands.write(settings + b"\n")
            self._commands.flush()

    def wait_until_ready(self) -> None:
        """Raises `ConfigError` where it ends instead."""
        if self._answers.readline() != b"ready\n":
            raise ConfigError(self.end())

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def end(self) -> str:
        """How it ended, with its last words. Waits until it has."""
        status = self._process.wait()
        self._echo.join(1.0)  # a child of its own may hold the pipe open
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        words = "\n".join(self._last_lines)
        said = f"; its last words:\n{words}" if words else " and said nothing"
        return f"the process of rank {self.rank} {how} while it started{said}"

    def send(self, data: bytes) -> None:
        self._commands.write(LENGTH.pack(len(data)) + data)
        self._commands.flush()

    def receive(self) -> tuple[int, Outcome] | None:
        """None: it has ended."""
        data = self._answers.read(OUTCOME.size)
        if len(data) < OUTCOME.size:
            return None
        step_id, is_done, checksum = OUTCOME.unpack(data)
        return step_id, (is_done, checksum)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._commands.close()
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()

    def kill(self) -> None:
        self._process.kill()

    def _pass_on(self, errors: IO[bytes]) -> None:
        """What it says on standard error, to this process's own."""
        for line in errors:
            with contextlib.suppress(OSError):
                os.write(_STANDARD_ERROR, line)
            if text := line.decode(errors="replace").strip():
                self._last_lines.append(text[:_MAX_LINE])


def build_beside(others: Sequence[OtherRank], build: Callable[[], T]) -> T:
    """What `build` makes of the rank in this process; it waits for `others` now and then.

    Raises what `build` raises, and `ConfigError` where another rank ends before it is done: of one that is lost a
    library says so minutes later, or never. Its thread then is left to itself.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(build())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="pelton-rank-0", daemon=True).start()
    while not wait([done], _LOOK_S).done and _find_lost(others) is None:
        pass
    # What ends one rank may end all, and who loses another may notice first: this one's own reason comes first, then
    # the lost one's, then what it is to be alone.
    error = None if wait([done], _NOTICE_S).not_done else done.exception()
    if done.done() and (error is None or isinstance(error, PeltonError)):
        return done.result()
    until_s = time.monotonic() + _NOTICE_S
    while (lost := _find_lost(others)) is None and time.monotonic() < until_s:
        time.sleep(_LOOK_S)
    if lost is not None:
        raise ConfigError(lost.end()) from error
    if isinstance(error, ConnectionError):
        raise ConfigError(str(error)) from error
    return done.result()


def _find_lost(others: Sequence[OtherRank]) -> OtherRank | None:
    return next((other for other in others if other.has_ended()), None)
