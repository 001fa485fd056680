"""Migrations make the tables that the modules define, once, whoever comes first."""

from __future__ import annotations

import asyncio
import importlib
import stat
import subprocess
import sys
from typing import Any

import pytest
from sqlalchemy import inspect

from pelton.core.errors import ConfigError
from pelton.store import tables
from pelton.store.config import StoreConfig
from pelton.store.database import Database, DatabaseError, open_database

# Modules that define tables on `tables.metadata`.
TABLE_MODULES = (
    "pelton.store.tables",
    "pelton.store.responses",
    "pelton.store.batch_tables",
    "pelton.store.completions",
)


async def test_tables_are_as_the_modules_say(database: Database) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    for name in TABLE_MODULES:
        importlib.import_module(name)

    def compare(connection: Any) -> list[Any]:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, tables.metadata))

    async with database.read() as connection:
        assert await connection.run_sync(compare) == []


async def test_servers_that_start_at_once(store_config: StoreConfig) -> None:
    databases = await asyncio.gather(*(open_database(store_config) for _ in range(6)))
    async with databases[0].read() as connection:
        names = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
    assert {"tenants", "api_keys", "usage_hours"} <= set(names)
    for database in databases:
        await database.close()


def test_processes_that_start_at_once(store_config: StoreConfig) -> None:
    code = (
        "import asyncio, sys; from pelton.store.config import StoreConfig; "
        "from pelton.store.database import open_database\n"
        "async def main():\n config = StoreConfig(data_dir=sys.argv[1], database_url=sys.argv[2] or None)\n"
        " await (await open_database(config)).close()\nasyncio.run(main())"
    )
    arguments = [sys.executable, "-c", code, store_config.data_dir or "", store_config.database_url or ""]
    processes = [subprocess.Popen(arguments, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


async def test_the_file_is_readable_to_its_user_only(tmp_path: Any) -> None:
    config = StoreConfig(data_dir=str(tmp_path / "new" / "folder"))
    await (await open_database(config)).close()
    assert config.sqlite_path is not None
    assert stat.S_IMODE(config.sqlite_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(config.sqlite_path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("url", ["mysql://a:secret@b/c", "secret", ""])
def test_a_wrong_url_is_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError) as error:
        StoreConfig(database_url=url)
    assert "secret" not in str(error.value)


async def test_nobody_there() -> None:
    with pytest.raises(DatabaseError):
        await open_database(StoreConfig(database_url="postgresql://pelton:secret@127.0.0.1:1/none"))


def test_a_server_imports_no_database() -> None:
    code = (
        "import sys, pelton.build, pelton.serving.app; from pelton.store.opener import Store; Store(); "
        "bad = [m for m in ('sqlalchemy', 'alembic', 'aiosqlite', 'asyncpg') if m in sys.modules]; sys.exit(str(bad)) "
        "if bad else None"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
