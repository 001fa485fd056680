"""The output and error files of a batch: a line each as it comes, so that they tell what is done.

A line's id ends with the number of its input line. What a crash leaves of a line is cut off.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct


class LineResponse(Struct, kw_only=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class LineError(Struct, kw_only=True):
    code: str
    message: str
    line: int
    param: str | None = None


class ResultLine(Struct, kw_only=True):
    id: str
    custom_id: str | None
    response: LineResponse | None
    error: LineError | None = None


class _Head(Struct):
    id: str


def result_id(batch_id: str, number: int) -> str:
    return f"batch_req_{batch_id.removeprefix('batch_')}_{number}"


class ResultFile:
    """Appends whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self.num_lines = 0

    def recover(self) -> set[int]:
        """Numbers of the input lines that it has a result of; cuts off the end of a line that is not whole."""
        numbers: set[int] = set()
        if not self.path.exists():
            return numbers
        end = 0
        with self.path.open("rb") as file:
            for data in file:
                try:
                    if not data.endswith(b"\n"):
                        break
                    numbers.add(int(msgspec.json.decode(data, type=_Head).id.rpartition("_")[2]))
                except (msgspec.DecodeError, ValueError):
                    break  # a crash of the whole machine may leave zeros
                end += len(data)
        os.truncate(self.path, end)
        self.num_lines = len(numbers)
        return numbers

    def clear(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)
        self.num_lines = 0

    def append(self, value: Any) -> None:
        """One write: another process sees all of the line or nothing, short of a crash in between."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        data = memoryview(msgspec.json.encode(value) + b"\n")
        while data:
            data = data[os.write(self._descriptor, data) :]
        self.num_lines += 1

    def finish(self) -> int:
        """Bring it to the disk; returns its number of bytes."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)
        self.close()
        return self.path.stat().st_size if self.path.exists() else 0

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
