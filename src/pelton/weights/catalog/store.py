"""The folder of pulled models.

    <cache>/<name>/                 a whole model: its files and pelton-manifest.json
    <cache>/.partial/<name>/<kind>/ what an unfinished pull has brought so far
    <cache>/.locks/<name>           held while a pull runs
    <cache>/.packed/                repacked weights, see `packed_files.py`

A model folder appears by one rename of a folder that is complete and on disk, so it is there whole
or not at all, whenever a pull is killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pelton.core.errors import DownloadError
from pelton.weights.config import model_cache_root
from pelton.weights.packed_files import PACKED_FOLDER, remove_packed

MANIFEST = "pelton-manifest.json"  # a hub folder may hold a manifest.json of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledModel:
    """`path` is the .gguf file, or the folder of a model of several files."""

    name: str
    path: Path
    source: str
    num_bytes: int
    sha256: Mapping[str, str]  # by file
    pulled_at: str  # ISO 8601, UTC


class ModelStore:
    def __init__(self, cache_dir: str | Path | None = None) -> None:
        self.root = model_cache_root(cache_dir)

    def try_installed(self, name: str) -> InstalledModel | None:
        folder = self.root / name
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            return _installed(name, folder, manifest)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def installed(self) -> list[InstalledModel]:
        if not self.root.is_dir():
            return []
        folders = sorted(path.name for path in self.root.iterdir() if not path.name.startswith("."))
        return [model for name in folders if (model := self.try_installed(name)) is not None]

    def staging(self, name: str, kind: str) -> Path:
        folder = self.root / ".partial" / name / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def partial_bytes(self, name: str) -> int:
        folder = self.root / ".partial" / name
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    def discard_partial(self, name: str, kind: str = "") -> None:
        shutil.rmtree(self.root / ".partial" / name / kind, ignore_errors=True)

    def forget_empty(self, name: str, kind: str) -> None:
        """Leave no empty folders behind a source that brought nothing."""
        folder = self.root / ".partial" / name / kind
        with suppress(OSError):
            folder.rmdir()
            folder.parent.rmdir()

    def install(
        self, name: str, folder: Path, sha256: Mapping[str, str], source: str, pulled_at: str
    ) -> InstalledModel:
        """Move the files `sha256` names from a staging folder into place."""
        ready = self.root / ".partial" / name / "ready"
        shutil.rmtree(ready, ignore_errors=True)
        for file_name in sha256:
            target = ready / file_name
            target.parent.mkdir(parents=True, exist_ok=True)
            (folder / file_name).replace(target)
            _sync(target)
        files = {file_name: (ready / file_name).stat().st_size for file_name in sha256}
        manifest = {"source": source, "files": files, "sha256": dict(sha256), "pulled_at": pulled_at}
        (ready / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        _sync(ready / MANIFEST)
        _sync(ready)
        target = self.root / name
        if target.exists():  # not whole, or it would not be pulled
            target.rename(ready.with_name("broken"))
        ready.replace(target)
        _sync(self.root)
        self.discard_partial(name)
        return _installed(name, target, manifest)

    def remove(self, name: str) -> bool:
        """False where there was nothing of that name."""
        with self.lock(name, lambda: None):
            folder = self.root / name
            partial = self.root / ".partial" / name
            found = folder.exists() or partial.exists()
            if folder.exists():
                for model in (folder, *folder.rglob("*.gguf")):
                    remove_packed(self.root / PACKED_FOLDER, model)
                # Renamed first, so that no half-removed model is ever seen.
                grave = self.staging(name, "removed") / "model"
                folder.rename(grave)
            self.discard_partial(name)
            return found

    @contextmanager
    def lock(self, name: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """Exclusive among processes and threads. The kernel lets go of it when its holder dies."""
        path = self.root / ".locks" / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
        except OSError as error:
            raise DownloadError(f"the model folder {self.root} cannot be written: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def check_free_space(self, name: str, needed_bytes: int) -> None:
        """Raises `DownloadError` where what is still missing does not fit on the disk."""
        free_bytes = shutil.disk_usage(self.root).free
        missing_bytes = needed_bytes - self.partial_bytes(name)
        if missing_bytes > free_bytes:
            raise DownloadError(
                f"{name} needs {_mib(missing_bytes)} more in {self.root}, where {_mib(free_bytes)} are free"
            )


def _installed(name: str, folder: Path, manifest: Mapping[str, Any]) -> InstalledModel:
    """Raises `ValueError` for a folder that does not hold what its manifest says."""
    files: dict[str, int] = manifest["files"]
    for file_name, num_bytes in files.items():
        if (folder / file_name).stat().st_size != num_bytes:
            raise ValueError(f"{file_name} does not have {num_bytes} bytes")
    [only, *others] = files
    return InstalledModel(
        name=name,
        path=folder / only if not others and only.endswith(".gguf") else folder,
        source=manifest["source"],
        num_bytes=sum(files.values()),
        sha256=manifest["sha256"],
        pulled_at=manifest["pulled_at"],
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
