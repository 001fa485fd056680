"""Every test here runs on SQLite and on a real PostgreSQL server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pelton.store.config import StoreConfig
from pelton.store.database import Database, open_database
from tests.postgres import Postgres


@pytest.fixture(params=["sqlite", "postgresql"])
def store_config(request: pytest.FixtureRequest, tmp_path: Path) -> StoreConfig:
    """Of an empty database."""
    if request.param == "sqlite":
        return StoreConfig(data_dir=str(tmp_path))
    server: Postgres = request.getfixturevalue("postgres")
    return StoreConfig(data_dir=str(tmp_path), database_url=server.new_database())


@pytest.fixture
async def database(store_config: StoreConfig) -> AsyncIterator[Database]:
    database = await open_database(store_config)
    yield database
    await database.close()
