"""`FileStore`: contents of files, in a folder of the data directory. Their names and owners are in the database."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import uuid
from pathlib import Path
from typing import BinaryIO

_FILE_ID = re.compile(r"file-[0-9a-f]{32}")
COPY_BYTES = 1 << 20


class FileStore:
    """Blocking: call it on a thread. `place` names the data directory, wherever the database is."""

    def __init__(self, data_path: Path) -> None:
        self._folder = data_path / "files"
        self._place: str | None = None

    @property
    def exists(self) -> bool:
        """Whether there was ever a file; looks at the disk."""
        return self._folder.exists()

    @property
    def place(self) -> str:
        if self._place is None:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            marker = self._folder / "place"
            # Two servers may start on one folder at once: the first name stays.
            with contextlib.suppress(FileExistsError):
                own = self._folder / f".{uuid.uuid4().hex}"
                own.write_text(uuid.uuid4().hex)
                try:
                    os.link(own, marker)
                finally:
                    own.unlink()
            self._place = marker.read_text()
        return self._place

    def path(self, file_id: str) -> Path:
        """Raises ValueError for what is not an id of ours, which could name any file."""
        if not _FILE_ID.fullmatch(file_id):
            raise ValueError(file_id)
        return self._folder / file_id

    def save(self, file_id: str, source: BinaryIO) -> int:
        """All or nothing; returns the number of bytes."""
        _ = self.place
        path, partial = self.path(file_id), self._folder / f".{file_id}.partial"
        num_bytes = 0
        source.seek(0)
        try:
            with partial.open("wb") as target:
                while data := source.read(COPY_BYTES):
                    target.write(data)
                    num_bytes += len(data)
                target.flush()
                os.fsync(target.fileno())
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
        return num_bytes

    def remove(self, file_id: str) -> None:
        self.path(file_id).unlink(missing_ok=True)

    def try_lock(self) -> BinaryIO | None:
        """The right to run the batches of this folder: one process at a time, until it ends or the file is closed."""
        _ = self.place
        file = (self._folder / "runner.lock").open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
        return file


def new_file_id() -> str:
    return f"file-{uuid.uuid4().hex}"
