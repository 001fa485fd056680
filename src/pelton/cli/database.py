"""Commands that work on the database itself, whether a server runs or not."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from cyclopts import Parameter

from pelton.core.errors import ConfigError

if TYPE_CHECKING:
    from pelton.store.database import Database

DataDirFlag = Annotated[str | None, Parameter(help="folder of the database; default: ~/.local/share/pelton")]
UrlFlag = Annotated[str | None, Parameter(help="postgresql://USER:PASSWORD@HOST/NAME instead of a SQLite file")]
ConfigFlag = Annotated[Path | None, Parameter(help="YAML file with settings, as of `pelton serve`")]
JsonFlag = Annotated[bool, Parameter(name="--json", negative=(), help="print JSON")]
ResultT = TypeVar("ResultT")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def with_database(
    use: Callable[[Database], Awaitable[ResultT]], data_dir: str | None, database_url: str | None, config: Path | None
) -> ResultT:
    """What `use` makes of the database that the settings name. Raises `ConfigError` or `DatabaseError`."""
    from pelton.cli.settings import resolve_settings
    from pelton.store.database import open_database

    given = {"data_dir": data_dir, "database_url": database_url}
    flags = {name: value for name, value in given.items() if value is not None}
    resolved = resolve_settings(flags, os.environ, config).store

    async def run() -> ResultT:
        database = await open_database(resolved)
        try:
            return await use(database)
        finally:
            await database.close()

    return asyncio.run(run())


def parse_duration_s(text: str) -> float:
    """`90s`, `30m`, `12h`, `30d`, `2w`. Raises `ConfigError`."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is no duration; write 90s, 30m, 12h, 30d or 2w")
    return float(match[1]) * _UNIT_S[match[2]]


def format_time(time_s: float | None) -> str:
    return "" if time_s is None else datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M")


def parse_date_s(text: str) -> float:
    """`2026-11-22`, or that and a time, in UTC. Raises `ConfigError`."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{text!r} is no date; write 2026-11-22 or 2026-11-22T15:00") from None
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


def month_start_s() -> float:
    now = datetime.fromtimestamp(time.time(), UTC)
    return datetime(now.year, now.month, 1, tzinfo=UTC).timestamp()
