"""Progress of a pull: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pelton.weights.catalog.progress import ProgressCallback, PullProgress
    from pelton.weights.config import ModelConfig


def pull_model(config: ModelConfig) -> Path:
    """The model's file or folder, pulled with progress on standard error where it is not there yet."""
    from pelton.weights.catalog import resolve_model

    with show_progress() as progress:
        return resolve_model(config, progress)


@contextmanager
def show_progress() -> Iterator[ProgressCallback]:
    if not sys.stderr.isatty():
        yield _LineLog().report
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", visible=False)

        def report(progress: PullProgress) -> None:
            bar.update(
                task,
                description=f"{progress.name}: {progress.phase}",
                completed=progress.num_bytes,
                total=progress.total_bytes,
                visible=True,
            )

        yield report


class _LineLog:
    """A line for each new phase or source, and for every quarter of the way."""

    def __init__(self) -> None:
        self._last = ("", "", -1)

    def report(self, progress: PullProgress) -> None:
        quarter = 4 * progress.num_bytes // progress.total_bytes if progress.total_bytes else 0
        now = (str(progress.phase), progress.source, quarter)
        if now == self._last:
            return
        self._last = now
        share = f" {100 * progress.num_bytes // progress.total_bytes}%" if progress.total_bytes else ""
        source = f" from {progress.source}" if progress.source else ""
        print(f"{progress.name}: {progress.phase}{share}{source}", file=sys.stderr)
