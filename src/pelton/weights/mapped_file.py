"""Opening what may be hostile: regular files only, mapped read-only; text and JSON with a size limit."""

from __future__ import annotations

import json
import mmap
import os
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pelton.core.errors import ModelFileError, ModelNotFoundError

MAX_JSON_BYTES = 64 * 2**20

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120


def shown(value: object) -> str:
    """`repr` cut to a length fit for a message, whatever a file put there."""
    return _short.repr(value)


def check_regular_file(path: Path) -> None:
    """Anything else (a pipe, a device) could block for ever."""
    try:
        if path.is_file():
            return
        exists = path.exists()
    except OSError as error:
        raise ModelFileError(path, f"cannot be opened: {error.strerror}") from error
    if exists:
        raise ModelFileError(path, "not a regular file")
    raise ModelNotFoundError(f"{path}: no such file")


def map_file(path: Path) -> mmap.mmap:
    """A read-only map of the whole file."""
    check_regular_file(path)
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:
        raise ModelFileError(path, "the file is empty") from error
    except OSError as error:
        raise ModelFileError(path, f"cannot be opened: {error.strerror}") from error


def drop_pages(data: mmap.mmap) -> None:
    """Unmap the pages of a read-only map that were touched; the next access maps them again."""
    if hasattr(mmap, "MADV_DONTNEED"):
        data.madvise(mmap.MADV_DONTNEED)


def read_text(path: Path, max_bytes: int = MAX_JSON_BYTES) -> str:
    check_regular_file(path)
    try:
        with path.open("rb") as file:
            # Not read(max_bytes): that reserves the buffer in full.
            content = file.read(min(os.fstat(file.fileno()).st_size, max_bytes) + 1)
    except OSError as error:
        raise ModelFileError(path, f"cannot be opened: {error.strerror}") from error
    if len(content) > max_bytes:
        raise ModelFileError(path, f"larger than {max_bytes} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileError(path, "not valid UTF-8") from error


def parse_json_object(path: Path, text: str, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Decode `text`, found in the file `path`, which must hold a JSON object."""
    try:
        value = json.loads(text, object_pairs_hook=pairs_hook)
    except RecursionError as error:
        raise ModelFileError(path, "JSON is nested too deeply") from error
    except ValueError as error:
        raise ModelFileError(path, f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(path, f"holds a JSON {type(value).__name__}; an object is expected")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = parse_json_object(path, read_text(path))
    return value
