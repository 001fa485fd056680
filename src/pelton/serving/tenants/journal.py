"""`Journal`: usage written ahead of delivery, so that a killed process has lost nothing that a client has.

A line is written with every update of the engine that holds tokens, before any of them is handed on: the CRC-32 of
the rest, then JSON `[hour, engine run, [prompt, output], [[tenant, key, requests, prompt, cached, output], ...]]`; the
second pair is what the engine's own counters said in that update. `write` gives it to the operating system, which
keeps it when the process is killed; `sync` (from time to time) also survives the machine's end. A line that a
crash has cut off is not taken.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from pelton.store.records import JournalContent, Tokens

SUFFIX = ".journal"
Row = tuple[str, str, int, int, int, int]


class Journal:
    """One file, locked while its process lives; its name is its id."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.journal_id = uuid4().hex
        self.path = folder / f"{self.journal_id}{SUFFIX}"
        # Named only once it is locked, so that nobody takes it for one whose process has ended.
        unnamed = self.path.with_suffix(".new")
        self._file = os.open(unnamed, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(unnamed, self.path)
        self.is_empty = True
        self._num_bytes = 0

    def append(self, hour_s: int, run_id: str, totals: tuple[int, int], rows: list[Row]) -> None:
        """Raises `OSError`, and the line is not there then."""
        body = json.dumps([hour_s, run_id, totals, rows], separators=(",", ":")).encode()
        line = b"%08x %s\n" % (zlib.crc32(body), body)
        written = os.write(self._file, line)
        if written != len(line):  # the disk is full
            os.ftruncate(self._file, self._num_bytes)
            raise OSError(28, "the usage journal could not be written")
        self._num_bytes += written
        self.is_empty = False

    def sync(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
        """Unlocks it too: from now on it is for whoever folds it."""
        if self.is_empty:
            self.path.unlink(missing_ok=True)
        os.close(self._file)


def read_journal(path: Path) -> JournalContent:
    """All of it up to the first line that is not whole."""
    usage: dict[tuple[int, str, str], Tokens] = {}
    engine_totals: dict[str, tuple[int, int]] = {}
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or not _is_whole(line):
                break
            hour_s, run_id, totals, rows = json.loads(line[9:])
            engine_totals[run_id] = (totals[0], totals[1])
            for tenant_id, key_id, *counts in rows:
                usage.setdefault((hour_s, tenant_id, key_id), Tokens()).add(Tokens(*counts))
    return JournalContent(usage, engine_totals)


def _is_whole(line: bytes) -> bool:
    if len(line) < 10:
        return False
    try:
        return int(line[:8], 16) == zlib.crc32(line[9:-1])
    except ValueError:
        return False


def journals(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


@contextlib.contextmanager
def try_claim(path: Path) -> Iterator[bool]:
    """True: its process has ended, and it is ours alone until the block ends."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _try_lock(file) and path.exists()  # another server may have taken it in meanwhile
    finally:
        os.close(file)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
