"""One pull: lock, fetch from the first mirror that can, verify, put in place."""

from __future__ import annotations

import errno
import hashlib
import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pelton.core.errors import DownloadError, ModelNotFoundError
from pelton.weights.catalog.progress import ProgressCallback, PullPhase, PullProgress
from pelton.weights.catalog.sources import Fetched, Source, WantedFile
from pelton.weights.catalog.store import InstalledModel, ModelStore

_log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 22
_REPORT_INTERVAL_S = 0.1


def pull_model(
    store: ModelStore, name: str, sources: Sequence[Source], wanted: WantedFile, progress: ProgressCallback
) -> InstalledModel:
    """Returns at once what is already there. Raises `DownloadError` or `ModelNotFoundError`.

    What an unfinished pull brought is kept, and the next one goes on from there.
    """
    if (found := store.try_installed(name)) is not None:
        return found
    with store.lock(name, lambda: progress(PullProgress(name, PullPhase.WAITING))):
        if (found := store.try_installed(name)) is not None:  # by the pull that held the lock
            return found
        problems: list[DownloadError | ModelNotFoundError] = []
        for source in sources:
            try:
                return _pull_from(store, name, source, wanted, progress)
            except (DownloadError, ModelNotFoundError) as error:
                _log.info("%s cannot be had from %s: %s", name, source.description, error)
                problems.append(error)
            except OSError as error:
                raise _disk_error(error, name, store) from error
            finally:
                store.forget_empty(name, source.kind)
    if len(problems) == 1:
        raise problems[0]
    raise DownloadError(f"{name} could not be pulled: " + "; ".join(str(problem) for problem in problems))


class _Watch:
    """Turns a source's byte counts into progress, at most ten times a second, once there is room for them."""

    def __init__(
        self, store: ModelStore, name: str, source: str, total_bytes: int | None, progress: ProgressCallback
    ) -> None:
        self._store = store
        self._name = name
        self._source = source
        self._total_bytes: int | None = None
        self._progress = progress
        self._next_report_s = 0.0
        self._expect(total_bytes)
        self.phase(PullPhase.CONNECTING)

    def phase(self, phase: PullPhase, num_bytes: int = 0) -> None:
        self._progress(PullProgress(self._name, phase, self._source, num_bytes, self._total_bytes))

    def report(self, num_bytes: int, total_bytes: int | None) -> None:
        self._expect(total_bytes)
        if num_bytes == self._total_bytes or time.monotonic() >= self._next_report_s:
            self._next_report_s = time.monotonic() + _REPORT_INTERVAL_S
            self.phase(PullPhase.DOWNLOADING, num_bytes)

    def _expect(self, total_bytes: int | None) -> None:
        if total_bytes is not None and total_bytes != self._total_bytes:
            self._total_bytes = total_bytes
            self._store.check_free_space(self._name, total_bytes)


def _pull_from(
    store: ModelStore, name: str, source: Source, wanted: WantedFile, progress: ProgressCallback
) -> InstalledModel:
    staging = store.staging(name, source.kind)
    watch = _Watch(store, name, source.description, wanted.num_bytes, progress)
    fetched = source.fetch(staging, wanted, watch.report)
    watch.phase(PullPhase.VERIFYING)
    sha256 = {file_name: _sha256(fetched.folder / file_name) for file_name in fetched.files}
    if (problem := _mismatch(fetched, sha256, wanted)) is not None:
        store.discard_partial(name, source.kind)
        raise DownloadError(f"{source.description}: {problem}; what it sent is removed")
    pulled_at = datetime.now(UTC).isoformat(timespec="seconds")
    model = store.install(name, fetched.folder, sha256, source.description, pulled_at)
    watch.phase(PullPhase.DONE, model.num_bytes)
    return model


def _mismatch(fetched: Fetched, sha256: dict[str, str], wanted: WantedFile) -> str | None:
    expected = dict(fetched.sha256)
    if wanted.sha256 is not None:
        expected[fetched.files[0]] = wanted.sha256
    for file_name, digest in expected.items():
        if sha256[file_name] != digest:
            return f"{file_name} has SHA-256 {sha256[file_name]}, expected {digest}"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256", _bufsize=_CHUNK_BYTES).hexdigest()


def _disk_error(error: OSError, name: str, store: ModelStore) -> DownloadError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DownloadError(f"the disk of {store.root} is full; {name} can go on once there is room")
    return DownloadError(f"{name} could not be written to {store.root}: {error}")
