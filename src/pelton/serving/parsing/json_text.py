"""JSON values out of a text that is still arriving: passed on as the model wrote them, character by character.

Only what is needed to find a value's end is looked at. What a model writes may be no JSON at all; line breaks and
other control characters that it left bare within a string, as small models do, are escaped.
"""

from __future__ import annotations

import json
import re

from pelton.serving.parsing.reader import Emit, Steps, TextReader

MAX_DEPTH = 256
_NOT_STRUCTURE = re.compile(r'[^"{}\[\]]+')
_NOT_QUOTE = re.compile(r'[^"\\]+')
_CONTROL = re.compile(r"[\x00-\x1f]")
_SCALAR = re.compile(r"[^\s,\]}:{\[\"]+")


class MalformedError(Exception):
    """The text is not what the format says."""


def pass_value(reader: TextReader, emit: Emit) -> Steps[bool]:
    """Emit the JSON value that stands here. False where the text ends within it. Raises `MalformedError`."""
    first = yield from reader.skip_space()
    if first == '"':
        return (yield from _pass_string(reader, emit))
    if first in ("{", "["):
        return (yield from _pass_container(reader, emit))
    scalar = yield from reader.scan(_SCALAR)
    if not scalar:
        if first == "":
            return False
        raise MalformedError
    emit(scalar)
    return True


def read_value(reader: TextReader) -> Steps[str | None]:
    """The JSON value that stands here, as text. None where the text ends within it. Raises `MalformedError`."""
    parts: list[str] = []
    is_whole = yield from pass_value(reader, parts.append)
    return "".join(parts) if is_whole else None


def read_string(reader: TextReader) -> Steps[str | None]:
    """A JSON string's value. None where the text ends within it. Raises `MalformedError`."""
    if (yield from reader.skip_space()) not in ('"', ""):
        raise MalformedError
    text = yield from read_value(reader)
    return None if text is None else decode_string(text)


def decode_string(text: str) -> str:
    """Raises `MalformedError`."""
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        raise MalformedError from None
    if not isinstance(value, str):
        raise MalformedError
    return value


def _pass_string(reader: TextReader, emit: Emit) -> Steps[bool]:
    emit('"')
    reader.position += 1
    while True:
        char = yield from reader.peek()
        if char == "":
            return False
        if char == '"':
            reader.position += 1
            emit('"')
            return True
        if char == "\\":
            reader.position += 1
            escaped = yield from reader.peek()
            reader.position += len(escaped)
            emit(char + escaped)
            continue
        match = _NOT_QUOTE.match(reader.text, reader.position)
        assert match is not None
        reader.position = match.end()
        emit(_CONTROL.sub(_escape, match.group()))


def _escape(match: re.Match[str]) -> str:
    return json.dumps(match.group())[1:-1]


def _pass_container(reader: TextReader, emit: Emit) -> Steps[bool]:
    closers: list[str] = []
    while True:
        char = yield from reader.peek()
        if char == "":
            return False
        if char == '"':
            if not (yield from _pass_string(reader, emit)):
                return False
            continue
        if char in ("{", "["):
            closers.append("}" if char == "{" else "]")
            if len(closers) > MAX_DEPTH:
                raise MalformedError
        elif char in ("}", "]"):
            if closers.pop() != char:
                raise MalformedError
            if not closers:
                emit(char)
                reader.position += 1
                return True
        else:
            match = _NOT_STRUCTURE.match(reader.text, reader.position)
            assert match is not None
            reader.position = match.end()
            emit(match.group())
            continue
        emit(char)
        reader.position += 1
