"""Bounded rendering: a chat template runs in a helper process that can be ended (law 7).

A loop of 10^9 turns, `'a' * 10**10` or `9**9**9` run in C or for ever; no thread can be stopped in
the middle of that, a process can. One rendering takes about 0.2 ms longer this way.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from pelton.core.errors import ServiceUnavailableError
from pelton.serving.template_error import ChatTemplateError, Message
from pelton.serving.template_worker import RenderAnswer, RenderCall, TemplateSource, read_frame, write_frame

TIME_LIMIT_S = 2.0
MEMORY_LIMIT_BYTES = 1 << 30
MAX_OUTPUT_BYTES = 1 << 26
NUM_PROCESSES = 2
# Beyond the time limit: for the start of a helper, and for a machine that is busy elsewhere.
_GRACE_S = 5.0


class TemplateRenderer:
    """`ChatTemplate.render` within limits. Thread-safe; up to `num_processes` renderings at a time."""

    def __init__(
        self,
        source: str,
        variables: Mapping[str, Any] | None = None,
        *,
        time_limit_s: float = TIME_LIMIT_S,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
        num_processes: int = NUM_PROCESSES,
    ) -> None:
        self.source = source
        self._time_limit_s = time_limit_s
        self._setup = msgspec.msgpack.encode(
            TemplateSource(source, dict(variables or {}), time_limit_s, memory_limit_bytes, MAX_OUTPUT_BYTES)
        )
        # None stands for a helper that is yet to be started. Last in, first out: one helper serves
        # an unhurried server, the second is started under load.
        self._idle: queue.LifoQueue[_Helper | None] = queue.LifoQueue()
        for _ in range(num_processes):
            self._idle.put(None)
        self._closed = threading.Event()

    def start(self) -> None:
        """Start a helper ahead of the first rendering, and have it compile the template.

        Raises `ChatTemplateError` where the template does not compile; what it says to a
        conversation of no messages does not matter.
        """
        with contextlib.suppress(ChatTemplateError):
            self.render([])

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. Raises `ChatTemplateError`, also where a limit is passed."""
        call = RenderCall(
            [dict(message) for message in messages],
            [dict(tool) for tool in tools] if tools is not None else None,
            add_generation_prompt,
            continue_final_message,
            dict(variables or {}),
        )
        try:
            frame = msgspec.msgpack.encode(call)
        except (OverflowError, RecursionError, UnicodeEncodeError) as error:
            raise ChatTemplateError(f"the messages cannot be handed to the chat template: {error}") from None
        answer = self._call(frame)
        if answer.text is None:
            raise ChatTemplateError(answer.problem or "the chat template fails")
        return answer.text

    def close(self) -> None:
        """End the helpers; renderings in progress fail."""
        self._closed.set()
        with contextlib.suppress(queue.Empty):
            while True:
                helper = self._idle.get_nowait()
                if helper is not None:
                    helper.close()

    def _call(self, frame: bytes) -> RenderAnswer:
        timeout_s = self._time_limit_s + _GRACE_S
        try:
            helper = self._idle.get(timeout=timeout_s)
        except queue.Empty:
            raise ServiceUnavailableError("every chat template helper is busy; try again later") from None
        try:
            if helper is None:
                if self._closed.is_set():
                    raise ServiceUnavailableError("the server is shutting down")
                helper = _Helper(self._setup)
            return helper.call(frame, timeout_s)
        except (EOFError, OSError):
            # Killed by its own alarm, or by the kernel for want of memory.
            assert helper is not None
            helper.close()
            helper = None
            raise ChatTemplateError(
                f"the chat template took more than {self._time_limit_s:g} s or too much memory for these messages"
            ) from None
        finally:
            if self._closed.is_set() and helper is not None:
                helper.close()
                helper = None
            self._idle.put(helper)


class _Helper:
    def __init__(self, setup: bytes) -> None:
        self._connection, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pelton.serving.template_worker", str(fd)],
                pass_fds=[fd],
                stdin=subprocess.DEVNULL,
            )
        self._connection.settimeout(_GRACE_S)
        write_frame(self._connection, setup)

    def call(self, frame: bytes, timeout_s: float) -> RenderAnswer:
        self._connection.settimeout(timeout_s)
        write_frame(self._connection, frame)
        return msgspec.msgpack.decode(read_frame(self._connection, MAX_OUTPUT_BYTES), type=RenderAnswer)

    def close(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()
