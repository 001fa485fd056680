"""`Store`: the process's one database, opened when it is first asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from pelton.store.config import StoreConfig

if TYPE_CHECKING:
    from pelton.store.database import Database


class Store:
    """Cheap to make and to import: nothing of the database is loaded before `database` is called."""

    def __init__(self, config: StoreConfig | None = None) -> None:
        self.config = config or StoreConfig()
        self._database: Database | None = None
        self._opening = asyncio.Lock()

    @property
    def is_open(self) -> bool:
        return self._database is not None

    async def database(self) -> Database:
        """Opened and migrated. Raises `DatabaseError` or `ConfigError`; the next call tries again."""
        async with self._opening:
            if self._database is None:
                # A third of a second of imports, while the event loop has requests to serve.
                open_database = await asyncio.to_thread(_load)
                self._database = await open_database(self.config)
        return self._database

    async def close(self) -> None:
        if self._database is not None:
            await self._database.close()
            self._database = None


def _load() -> Callable[[StoreConfig], Awaitable[Database]]:
    import alembic.command
    import alembic.config  # noqa: F401

    from pelton.store.database import open_database

    return open_database
