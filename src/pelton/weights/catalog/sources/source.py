"""The protocol that every source implements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

# (bytes on disk so far, total or None where unknown)
ReportBytes = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True)
class WantedFile:
    """What the catalog knows beforehand of a model that is one file."""

    file_name: str | None = None
    num_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Fetched:
    """`files` are complete, relative to `folder`. `sha256` holds the hashes that the source promises."""

    folder: Path
    files: tuple[str, ...]
    sha256: Mapping[str, str] = field(default_factory=dict)


class Source(Protocol):
    @property
    def kind(self) -> str:
        """Registry name; also names the staging folder, so that mirrors never mix their bytes."""
        ...

    @property
    def description(self) -> str:
        """What users and the manifest call it; parsing it again gives the same source where it can be typed."""
        ...

    @property
    def default_name(self) -> str:
        """Folder name in the cache for a model that is not in the catalog."""
        ...

    def fetch(self, staging: Path, wanted: WantedFile, report: ReportBytes) -> Fetched:
        """Bring the model into `staging`, continuing from what is there.

        Raises `DownloadError` where another mirror or a later try may succeed, `ModelNotFoundError`
        where the source says that there is no such model.
        """
        ...
