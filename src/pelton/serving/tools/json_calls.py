"""Reading a call that is written as a JSON object: `{"name": ..., "arguments": {...}}` and kin."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from pelton.serving.parsing.json_text import (
    MalformedError,
    decode_string,
    pass_value,
    read_string,
    read_value,
)
from pelton.serving.parsing.reader import Steps, TextReader
from pelton.serving.parsing.sink import AnswerSink

NAME_KEYS = ("name",)
ARGUMENT_KEYS = ("arguments", "parameters")


@dataclass(slots=True)
class CallObject:
    """A call that is being read. It has started once its name and its arguments' beginning are there."""

    sink: AnswerSink
    tool_names: frozenset[str] | None  # None: any name
    name: str | None = None
    arguments: str | None = None  # those that came ahead of the name
    has_started: bool = False

    def start(self) -> None:
        assert self.name is not None
        if self.tool_names is not None and self.name not in self.tool_names:
            raise MalformedError
        self.has_started = True
        self.sink.start_call(self.name)


def read_calls(reader: TextReader, sink: AnswerSink, tool_names: frozenset[str] | None) -> Steps[bool]:
    """Read the call that stands here and those right after it, in a JSON array or not.

    False, and nothing passed, where there is none.
    """
    reader.mark()
    is_array = (yield from reader.skip_space()) == "["
    if is_array:
        reader.position += 1
        yield from reader.skip_space()
    if not (yield from read_call(reader, sink, tool_names)):
        reader.rewind()
        return False
    while True:
        reader.release()
        reader.mark()
        following = yield from reader.skip_space()
        if is_array and following == "]":
            reader.position += 1
            reader.release()
            return True
        if following in (",", ";"):
            reader.position += 1
            following = yield from reader.skip_space()
        if following != "{" or not (yield from read_call(reader, sink, tool_names)):
            reader.rewind()
            return True


def read_call(reader: TextReader, sink: AnswerSink, tool_names: frozenset[str] | None) -> Steps[bool]:
    """Read the object that stands here, and tell the sink. False, and nothing passed, where it is no call.

    Only a call of one of `tool_names` counts, where they are given. A call that breaks off, or goes on with what
    is no JSON, has the arguments that it has.
    """
    call = CallObject(sink, tool_names)
    reader.mark()
    with contextlib.suppress(MalformedError):
        yield from _read_members(reader, call)
        if not call.has_started and tool_names is None and call.name is not None:
            call.start()  # a call without arguments
            sink.arguments("{}")
    if not call.has_started:
        reader.rewind()
        return False
    sink.end_call()
    reader.release()
    return True


def pass_arguments(reader: TextReader, sink: AnswerSink) -> Steps[None]:
    """The arguments' object, which stands here, and the end of a call that has started."""
    with contextlib.suppress(MalformedError):
        yield from pass_value(reader, sink.arguments)
    sink.end_call()


def _read_members(reader: TextReader, call: CallObject) -> Steps[None]:
    if not (yield from reader.take(("{",))):
        raise MalformedError
    if (yield from reader.skip_space()) == "}":
        raise MalformedError
    while True:
        key = yield from read_string(reader)
        if (yield from reader.skip_space()) != ":" or key is None:
            raise MalformedError
        reader.position += 1
        yield from reader.skip_space()
        yield from _read_member(reader, call, key)
        following = yield from reader.skip_space()
        reader.position += len(following)
        if following == "}":
            return
        if following != ",":
            raise MalformedError


def _read_member(reader: TextReader, call: CallObject, key: str) -> Steps[None]:
    if key in NAME_KEYS and call.name is None:
        call.name = yield from read_string(reader)
        if not call.name:
            raise MalformedError
        if call.arguments is not None:
            call.start()
            call.sink.arguments(call.arguments)
    elif key in ARGUMENT_KEYS and not call.has_started and call.arguments is None:
        yield from _read_arguments(reader, call)
    else:
        yield from read_value(reader)


def _read_arguments(reader: TextReader, call: CallObject) -> Steps[None]:
    first = yield from reader.peek()
    if call.name is not None and first == "{":
        call.start()
        yield from pass_value(reader, call.sink.arguments)
        return
    text = yield from read_value(reader)
    if text is None:
        raise MalformedError
    if text.startswith('"'):
        # The arguments' text as a string, as OpenAI's own format has it; any other string is JSON as it stands.
        inner = decode_string(text)
        text = inner if inner.lstrip().startswith("{") else text
    elif text == "null":
        text = "{}"
    call.arguments = text
    if call.name is not None:
        call.start()
        call.sink.arguments(text)
