"""`Database`: one engine over SQLite or PostgreSQL, opened and brought up to date."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from pelton.core.errors import ConfigError, ServiceUnavailableError
from pelton.store.config import StoreConfig

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_TIMEOUT_S = 15.0
# Held while migrations run, so that of two servers that start at once the second finds them done.
_MIGRATION_LOCK = 0x70656C746F6E


class DatabaseError(ServiceUnavailableError):
    """The database cannot be reached, or refused a statement."""

    code = "database_unavailable"


class Database:
    """Usable from one event loop. `begin` writes in a transaction, `read` sees one snapshot."""

    def __init__(self, url: str) -> None:
        self._engine = _make_engine(url)
        self.is_sqlite = self._engine.dialect.name == "sqlite"

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that writes. Raises `DatabaseError`."""
        with _typed_errors():
            async with self._engine.connect() as connection:
                # In SQLite a writer takes the lock at once: one that reads first could not wait for it later.
                await connection.execution_options(is_writer=True)
                async with connection.begin():
                    yield connection

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """Raises `DatabaseError`."""
        with _typed_errors():
            async with self._engine.connect() as connection:
                yield connection

    async def migrate(self) -> None:
        """Bring the tables up to date, all or none; another process that does the same is waited for."""
        async with self.begin() as connection:
            if not self.is_sqlite:
                await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            await connection.run_sync(_upgrade)

    async def close(self) -> None:
        await self._engine.dispose()


async def open_database(config: StoreConfig) -> Database:
    """Connect, and make or mend the tables. The folder is made where it is missing, readable to its user only."""
    path = config.sqlite_path
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise ConfigError(f"data_dir: {path} cannot be written: {error.strerror}") from None
    database = Database(config.url)
    try:
        await database.migrate()
    except BaseException:
        await database.close()
        raise
    return database


def _make_engine(url: str) -> AsyncEngine:
    try:
        parsed = make_url(url)
        is_sqlite = parsed.get_backend_name() == "sqlite"
        options: dict[str, Any] = {"connect_args": {"timeout": BUSY_TIMEOUT_S}}
        if not is_sqlite:
            options |= {"pool_pre_ping": True, "pool_size": 4}
        engine = create_async_engine(parsed, hide_parameters=True, **options)
    except (ArgumentError, ValueError) as error:
        # The message of a URL that cannot be parsed repeats it, with its password.
        raise ConfigError("database_url is not a URL such as postgresql://USER:PASSWORD@HOST/NAME") from error
    if is_sqlite:
        event.listen(engine.sync_engine, "connect", _prepare_sqlite)
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # Transactions are begun by us: the driver would begin them late, and none around a CREATE TABLE.
    connection.isolation_level = None
    cursor = connection.cursor()
    for statement in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", "PRAGMA foreign_keys = ON"):
        cursor.execute(statement)
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    is_writer = connection.get_execution_options().get("is_writer", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writer else "BEGIN")


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "heads")


class _typed_errors:
    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, (DBAPIError, OSError)):
            cause = getattr(error, "orig", None) or error
            raise DatabaseError(f"the database does not answer: {type(cause).__name__}: {cause}") from error
        if isinstance(error, SQLAlchemyError):
            raise DatabaseError(f"the database cannot be used: {type(error).__name__}: {error}") from error
