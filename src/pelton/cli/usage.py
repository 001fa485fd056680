"""`pelton usage`: tokens by tenant, key, day or hour, from the database."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from pelton.cli.database import (
    ConfigFlag,
    DataDirFlag,
    JsonFlag,
    UrlFlag,
    format_time,
    month_start_s,
    parse_date_s,
    with_database,
)

if TYPE_CHECKING:
    from pelton.store.database import Database
    from pelton.store.records import Tokens

_COLUMNS = {"tenant": "tenant_id", "key": "key_id", "hour": "hour_s", "day": "hour_s"}
_END_S = 1e11
DAY_S = 86400


def usage(
    *,
    by: Annotated[tuple[Literal["tenant", "key", "day", "hour"], ...], Parameter(help="what a row stands for")] = (
        "tenant",
        "key",
    ),
    tenant: Annotated[str | None, Parameter(help="this tenant's only")] = None,
    since: Annotated[str | None, Parameter(help="from this day on, UTC; default: the month's first")] = None,
    until: Annotated[str | None, Parameter(help="up to this day, without it")] = None,
    data_dir: DataDirFlag = None,
    database_url: UrlFlag = None,
    config: ConfigFlag = None,
    as_json: JsonFlag = False,
) -> int:
    """Show the tokens used, as far as they are in the database: a running server is up to 2 s ahead of it."""
    from pelton.store.usage import UsageTables

    since_s = month_start_s() if since is None else parse_date_s(since)
    until_s = _END_S if until is None else parse_date_s(until)
    columns = list(dict.fromkeys(_COLUMNS[name] for name in by))

    async def ask(database: Database) -> list[tuple[tuple[Any, ...], Tokens]]:
        return await UsageTables(database).report(since_s, until_s, by=columns, tenant_id=tenant)

    rows = with_database(ask, data_dir, database_url, config)
    if "day" in by:
        rows = _by_day(rows, columns.index("hour_s"))
    if as_json:
        found = [dict(zip(columns, keys, strict=True)) | asdict(used) for keys, used in rows]
        print(json.dumps(found, indent=1))
        return 0
    _print(rows, columns)
    return 0


def _by_day(rows: Iterable[tuple[tuple[Any, ...], Tokens]], index: int) -> list[tuple[tuple[Any, ...], Tokens]]:
    days: dict[tuple[Any, ...], Tokens] = {}
    for keys, used in rows:
        day = (*keys[:index], keys[index] // DAY_S * DAY_S, *keys[index + 1 :])
        if day in days:
            days[day].add(used)
        else:
            days[day] = used
    return list(days.items())


def _print(rows: list[tuple[tuple[Any, ...], Tokens]], columns: list[str]) -> None:
    from rich import box
    from rich.table import Table

    from pelton.cli.tables import print_table

    titles = {"tenant_id": "tenant", "key_id": "key", "hour_s": "from (UTC)"}
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(titles[column])
    for title in ("requests", "prompt", "of it cached", "output"):
        table.add_column(title, justify="right")
    for keys, used in rows:
        shown = [
            format_time(value) if column == "hour_s" else value for column, value in zip(columns, keys, strict=True)
        ]
        table.add_row(*shown, *(f"{count:,}" for count in asdict(used).values()))
    print_table(table)
