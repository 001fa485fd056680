"""Figures as text, tables that keep their width, and the progress bar of measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

OnProgress = Callable[[str, int, int], None]


def format_figure(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def print_table(table: Table) -> None:
    from rich.console import Console

    # A table squeezed into a narrow terminal, or a pipe's 80 columns, loses figures.
    Console(width=1000).print(table)


@contextmanager
def progress_bar() -> Iterator[tuple[OnProgress, Callable[[str], None]]]:
    """`(on_progress, say)`: a bar on a terminal's stderr, and lines above it that stay."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    # Two refreshes a second: the bar must not take time from the server on a small machine.
    with Progress(
        *columns, console=console, transient=True, refresh_per_second=2, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("")
        yield (
            lambda line, num_done, num_total: bar.update(task, description=line, completed=num_done, total=num_total),
            lambda line: console.print(line, highlight=False),
        )
