"""Request bodies: read within a limit, decoded into typed structs, refused with a reason."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from pelton.core.errors import InvalidRequestError
from pelton.serving.errors import ClientDisconnectedError, HTTPProblemError

READ_TIMEOUT_S = 60.0
# A client that is refused in the middle of its upload reads the answer only once it has sent the
# rest, so a bounded part of the rest is received and thrown away.
MAX_DISCARDED_BODIES = 2

StructT = TypeVar("StructT", bound=msgspec.Struct)
_PATH = re.compile(r"^(?P<problem>.*?)(?: - at (?:`key` in )?`(?P<path>.*)`)?$", re.DOTALL)
_FIELD = re.compile(r"^Object (?P<kind>missing required|contains unknown) field `(?P<field>.*)`$", re.DOTALL)


async def read_json_body(
    request: Request, struct: type[StructT], max_bytes: int, check_kinds: Callable[[Any], None] | None = None
) -> StructT:
    """The body as a `struct`. Raises `HTTPProblemError` (408, 413, 415) or `InvalidRequestError`.

    `check_kinds` may say better what is wrong with a body, given as plain values, than its first wrong field does.
    """
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not (
        content_type.startswith("application/") and content_type.endswith("+json")
    ):
        raise HTTPProblemError(
            415, f"content-type is {content_type!r}; it must be application/json", code="unsupported_media_type"
        )
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            body = await _read(request, max_bytes)
    except TimeoutError:
        raise HTTPProblemError(
            408,
            f"the body did not arrive within {READ_TIMEOUT_S:g} s",
            code="request_timeout",
            headers={"connection": "close"},
        ) from None
    return decode_json(body, struct, check_kinds)


async def _read(request: Request, max_bytes: int) -> bytes:
    too_large = HTTPProblemError(
        413,
        f"the body is larger than {max_bytes} bytes",
        code="request_too_large",
        headers={"connection": "close"},
    )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes * (1 + MAX_DISCARDED_BODIES):
        raise too_large
    parts: list[bytes] = []
    num_bytes = 0
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        part = message.get("body", b"")
        more = message.get("more_body", False)
        num_bytes += len(part)
        if num_bytes <= max_bytes:
            parts.append(part)
        else:
            parts.clear()
            if num_bytes > max_bytes * (1 + MAX_DISCARDED_BODIES):
                raise too_large
    if num_bytes > max_bytes:
        raise too_large
    return b"".join(parts)


@cache
def _decoder(struct: type[msgspec.Struct]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(struct)


def decode_json(body: bytes, struct: type[StructT], check_kinds: Callable[[Any], None] | None = None) -> StructT:
    """Strict: no boolean passes as a number, no unknown key, no NaN, no lone surrogate."""
    try:
        with _json_errors():
            value: StructT = _decoder(struct).decode(body)
            return value
    except msgspec.ValidationError as error:
        if check_kinds is not None and (found := _plain(body)) is not None:
            check_kinds(found)
        raise invalid_field(str(error), struct) from None


def decode_inner(raw: msgspec.Raw, struct: type[StructT], at: str, check_kind: Callable[[Any, str], None]) -> StructT:
    """A struct within the body that was left as it came, so that an error names its place, `at`.

    What is of an unknown kind has unknown fields too, but it is the kind that is wrong: `check_kind(value, at)` tells.
    """
    try:
        with _json_errors():
            value: StructT = _decoder(struct).decode(raw)
            return value
    except msgspec.ValidationError as error:
        if (found := _plain(raw)) is not None:
            check_kind(found, at)
        raise invalid_field(str(error), struct, at=at) from None


def _plain(body: bytes | msgspec.Raw) -> Any:
    """The JSON as it is, of which some was skipped so far, with errors of its own; None where a number is no float."""
    try:
        with _json_errors():
            return msgspec.json.decode(body)
    except msgspec.ValidationError:
        return None


@contextlib.contextmanager
def _json_errors() -> Iterator[None]:
    """What is wrong with the JSON itself; of its types, a `msgspec.ValidationError` comes out as it is."""
    try:
        yield
    except msgspec.ValidationError:
        raise
    except RecursionError:
        raise InvalidRequestError("the body is nested too deeply", code="invalid_json") from None
    except UnicodeDecodeError:
        raise InvalidRequestError("the body is not valid UTF-8", code="invalid_json") from None
    except (msgspec.DecodeError, ValueError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None


def invalid_field(message: str, struct: type[msgspec.Struct], what: str = "body", at: str = "") -> InvalidRequestError:
    """msgspec's message in our words: which parameter of the body or query, what was sent, what is expected.

    `at`: the place of the struct in the body, where it is not the body.
    """
    match = _PATH.match(message)
    assert match is not None
    problem, rest = match["problem"], (match["path"] or "$").removeprefix("$")
    path = at + rest if at else rest.removeprefix(".")
    field = _FIELD.match(problem)
    if field is not None:
        param = f"{path}.{field['field']}" if path else field["field"]
        if field["kind"] == "missing required":
            return InvalidRequestError(f"{param} is required", param=param, code="missing_required_parameter")
        hint = "" if rest else _nearest(field["field"], struct)
        return InvalidRequestError(f"unknown parameter {param!r}{hint}", param=param, code="unknown_parameter")
    problem = problem.replace("`", "").replace(" | null", " or null").replace(" | ", " or ")
    problem = problem[:1].lower() + problem[1:]
    if not path:
        return InvalidRequestError(f"the {what} is not usable: {problem}", code="invalid_type")
    code = "invalid_type" if ", got " in problem else "invalid_value"
    return InvalidRequestError(f"{path}: {problem}", param=path, code=code)


def _nearest(name: str, struct: type[msgspec.Struct]) -> str:
    nearest = difflib.get_close_matches(name[:64], struct.__struct_encode_fields__, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
