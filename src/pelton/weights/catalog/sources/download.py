"""Downloading a file over http or https, resumed with Range requests. Imported by a pull only: it is slow to import."""

from __future__ import annotations

import errno
import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

from pelton.core.errors import DownloadError, ModelNotFoundError
from pelton.weights.catalog.sources.source import ReportBytes

_log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30.0
_MAX_FRUITLESS_TRIES = 4  # in a row; a try that brought bytes starts the count again
_RETRY_DELAY_S = 0.2
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)  # the network has others


def download(url: str, description: str, partial: Path, report: ReportBytes) -> None:
    """Bring `url` to `partial`, going on from what is there. `description` is what messages call it."""
    fruitless = 0
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            if _continue_download(url, description, partial, report):
                return
            problem = "the connection ended early"
        except (OSError, http.client.HTTPException) as error:
            problem = _problem(error, description)
        after = partial.stat().st_size if partial.exists() else 0
        fruitless = 0 if after > before else fruitless + 1
        if fruitless >= _MAX_FRUITLESS_TRIES:
            kept = f"; {after} bytes are kept, pull again to go on" if after else ""
            raise DownloadError(f"{description}: {problem}{kept}")
        _log.info("%s: %s after %d bytes, trying again", description, problem, after)
        time.sleep(_RETRY_DELAY_S * 2**fruitless if fruitless else 0.0)


def _problem(error: Exception, description: str) -> str:
    """Words for an error that may pass; raises for one that will not."""
    if isinstance(error, urllib.error.HTTPError):
        if error.code in (404, 410):
            raise ModelNotFoundError(f"{description}: the server answers {error.code}, no such file") from error
        if error.code < 500 and error.code not in (408, 416, 429):
            raise DownloadError(f"{description}: the server answers {error.code} {error.reason}") from error
        return f"the server answers {error.code}"
    if isinstance(error, urllib.error.URLError):
        return f"no connection ({error.reason})"
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        raise error
    return f"{type(error).__name__}: {error}"


def _continue_download(url: str, description: str, partial: Path, report: ReportBytes) -> bool:
    """One connection. True when the file is complete."""
    state_path = partial.with_suffix(".state")
    start = partial.stat().st_size if partial.exists() else 0
    validator = _read_validator(state_path)
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "pelton"})
    if start and validator:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", validator)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing after `start`: complete, or not the file that was begun
            if error.headers.get("Content-Range") == f"bytes */{start}":
                return True
            partial.unlink()
        raise
    with response:
        if response.status != 206:
            start = 0
        elif not (response.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
            partial.unlink()
            raise http.client.HTTPException("the server answered with another range than was asked for")
        total = _total_bytes(response, start)
        state_path.write_text(json.dumps({"validator": _validator(response)}))
        with partial.open("r+b" if start else "wb") as file:
            file.seek(start)
            num_bytes = _copy(response, file, start, total, report)
            file.truncate()
    if total is not None and num_bytes > total:
        partial.unlink()
        raise DownloadError(f"{description}: the server sent more than the {total} bytes it announced")
    return total is None or num_bytes == total


def _copy(
    response: http.client.HTTPResponse, file: BinaryIO, start: int, total: int | None, report: ReportBytes
) -> int:
    num_bytes = start
    report(num_bytes, total)
    while chunk := response.read(_CHUNK_BYTES):
        file.write(chunk)
        num_bytes += len(chunk)
        report(num_bytes, total)
    return num_bytes


def _total_bytes(response: http.client.HTTPResponse, start: int) -> int | None:
    length = response.headers.get("Content-Length")
    return start + int(length) if length is not None and length.isdigit() else None


def _validator(response: http.client.HTTPResponse) -> str | None:
    """What proves, on the next try, that the file is still the same (RFC 9110, If-Range)."""
    etag = response.headers.get("ETag")
    if etag and not etag.startswith("W/"):
        return str(etag)
    modified = response.headers.get("Last-Modified")
    return str(modified) if modified else None


def _read_validator(state_path: Path) -> str | None:
    try:
        value = json.loads(state_path.read_text())["validator"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, str) else None
