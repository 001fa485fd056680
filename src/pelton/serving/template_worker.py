"""The helper process that renders chat templates: `python -m pelton.serving.template_worker FD`.

Reads and answers frames (length, then msgpack) on the socket FD. Whatever a template does here, it
does within a limit of memory and under an alarm that ends the process.
"""

from __future__ import annotations

import resource
import signal
import socket
import struct
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from pelton.serving.template_error import ChatTemplateError

if TYPE_CHECKING:
    from pelton.serving.chat_template import ChatTemplate

FRAME_HEADER = struct.Struct("<I")


class TemplateSource(msgspec.Struct, array_like=True):
    """The first frame."""

    source: str
    variables: dict[str, Any]
    time_limit_s: float
    memory_limit_bytes: int
    max_output_bytes: int


class RenderCall(msgspec.Struct, array_like=True):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    add_generation_prompt: bool
    continue_final_message: bool
    variables: dict[str, Any]


class RenderAnswer(msgspec.Struct, array_like=True):
    text: str | None
    problem: str | None = None


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


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    # The terminal's Ctrl-C goes to the whole process group; the parent decides when this one ends.
    # Not above: the server reads this module's frames and has no use for jinja2.
    from pelton.serving.chat_template import ChatTemplate

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    setup = msgspec.msgpack.decode(read_frame(connection), type=TemplateSource)
    resource.setrlimit(resource.RLIMIT_AS, (setup.memory_limit_bytes, setup.memory_limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    calls = msgspec.msgpack.Decoder(RenderCall)
    template: ChatTemplate | None = None
    while True:
        frame = read_frame(connection)
        signal.setitimer(signal.ITIMER_REAL, setup.time_limit_s)  # SIGALRM's default ends the process
        try:
            if template is None:
                template = ChatTemplate(setup.source, setup.variables)
            answer = RenderAnswer(_render(template, calls.decode(frame)))
        except ChatTemplateError as error:
            answer = RenderAnswer(None, str(error))
        data = msgspec.msgpack.encode(answer)
        if len(data) > setup.max_output_bytes:
            problem = f"the prompt is longer than {setup.max_output_bytes} bytes once the chat template is applied"
            data = msgspec.msgpack.encode(RenderAnswer(None, problem))
        signal.setitimer(signal.ITIMER_REAL, 0)
        write_frame(connection, data)


def _render(template: ChatTemplate, call: RenderCall) -> str:
    return template.render(
        call.messages,
        tools=call.tools,
        add_generation_prompt=call.add_generation_prompt,
        continue_final_message=call.continue_final_message,
        variables=call.variables,
    )


if __name__ == "__main__":
    try:
        main()
    except (EOFError, OSError):
        sys.exit(0)  # the parent is gone
