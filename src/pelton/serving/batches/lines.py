"""The lines of a batch's input: where each is, or what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
from msgspec import Meta, Struct

from pelton.core.errors import InvalidRequestError
from pelton.serving.request_body import decode_json

# What a line may ask for: its endpoint, and the name of the field that would stream it.
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")


class InputLine(Struct, kw_only=True, forbid_unknown_fields=True):
    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    number: int  # from 1, as editors count
    custom_id: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class BadLine:
    number: int
    custom_id: str | None
    code: str
    message: str
    param: str | None = None


@dataclass(slots=True)
class Scan:
    lines: list[Line] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    problem: BadLine | None = None  # with the whole file


def scan_input(path: Path, endpoint: str, *, max_lines: int, max_line_bytes: int) -> Scan:
    """Slow: runs on a thread. The same file gives the same answer every time."""
    scan = Scan()
    custom_ids: set[str] = set()
    try:
        with path.open("rb") as file:
            for number, offset, num_bytes, data in _split(file, max_line_bytes):
                if len(scan.lines) + len(scan.bad) >= max_lines:
                    scan.problem = BadLine(
                        number, None, "too_many_lines", f"a batch may have {max_lines} lines at most"
                    )
                    return scan
                checked = _check(number, data, endpoint, custom_ids, max_line_bytes)
                if isinstance(checked, BadLine):
                    scan.bad.append(checked)
                else:
                    scan.lines.append(Line(number, checked, offset, num_bytes))
    except OSError as error:
        scan.problem = BadLine(0, None, "file_missing", f"the input file cannot be read: {error.strerror}")
        return scan
    if not scan.lines and not scan.bad:
        scan.problem = BadLine(0, None, "empty_file", "the input file holds no line")
    return scan


def read_line(path: Path, line: Line) -> InputLine:
    """Raises OSError where the file is gone."""
    with path.open("rb") as file:
        file.seek(line.offset)
        return msgspec.json.decode(file.read(line.num_bytes), type=InputLine)


def _split(file: BinaryIO, max_line_bytes: int) -> Iterator[tuple[int, int, int, bytes | None]]:
    """(number, offset, bytes, content) of each line that is not blank; None for one that is too long."""
    number = offset = 0
    while data := file.readline(max_line_bytes + 1):
        number += 1
        num_bytes = len(data)
        is_long = num_bytes > max_line_bytes and not data.endswith(b"\n")
        while is_long and data and not data.endswith(b"\n"):  # the rest of it
            data = file.readline(1 << 20)
            num_bytes += len(data)
        if is_long or data.strip():
            yield number, offset, num_bytes, None if is_long else data
        offset += num_bytes


def _check(number: int, data: bytes | None, endpoint: str, custom_ids: set[str], max_line_bytes: int) -> str | BadLine:
    if data is None:
        return BadLine(number, None, "line_too_long", f"the line is longer than {max_line_bytes} bytes")
    try:
        line = decode_json(data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data, InputLine)
    except InvalidRequestError as error:
        return BadLine(number, _custom_id(data), error.code, str(error).replace("the body", "the line"), error.param)
    problem = None
    if line.custom_id in custom_ids:
        problem = ("duplicate_custom_id", "another line before it has this custom_id", "custom_id")
    elif line.method != "POST":
        problem = ("invalid_method", f"method is {line.method[:20]!r}; it must be 'POST'", "method")
    elif line.url != endpoint:
        problem = ("mismatched_url", f"url is {line.url[:100]!r}; the batch is for {endpoint}", "url")
    elif line.body.get("stream"):
        problem = ("invalid_value", "a line of a batch cannot be streamed; leave stream out", "body.stream")
    elif line.body.get("background"):
        problem = ("invalid_value", "a line of a batch runs in the background anyway; leave it out", "body.background")
    if problem is not None:
        return BadLine(number, line.custom_id, *problem)
    custom_ids.add(line.custom_id)
    return line.custom_id


def _custom_id(data: bytes) -> str | None:
    """Of a line that is JSON, but not a request."""
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    custom_id = value.get("custom_id") if isinstance(value, dict) else None
    return custom_id[:512] if isinstance(custom_id, str) else None
