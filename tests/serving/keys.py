"""A server with keys for tests, and what a test does with its database beside it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2

from pelton.core.api_key import Scope
from pelton.serving.config import ServerConfig
from pelton.store.access import AccessTables
from pelton.store.config import StoreConfig
from pelton.store.database import open_database
from tests.serving.make import RunningServer, running_server

ADMIN_KEY = "the-admin-key"
PROMPT = {"prompt": "abcdefghij", "max_tokens": 5}  # 10 tokens


@asynccontextmanager
async def tables(config: StoreConfig) -> AsyncIterator[AccessTables]:
    """As another process has them: `pelton keys`, say."""
    database = await open_database(config)
    try:
        yield AccessTables(database)
    finally:
        await database.close()


async def new_key(config: StoreConfig, tenant_id: str = "acme", *scopes: Scope, **changes: Any) -> tuple[str, str]:
    """(key id, key) of a tenant with limits."""
    async with tables(config) as access:
        if changes:
            await access.set_tenant(tenant_id, changes)
        record, new = await access.create_key(tenant_id, scopes=scopes or (Scope.INFERENCE,))
    return record.key_id, new.text


@contextlib.contextmanager
def key_server(config: StoreConfig, **options: Any) -> Iterator[RunningServer]:
    server_config = ServerConfig(admin_api_key=ADMIN_KEY)
    with running_server(config=server_config, store=config, **options) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def complete(server: RunningServer, key: str, **options: Any) -> httpx2.Response:
    return httpx2.post(f"{server.url}/v1/completions", json=PROMPT | options, headers=bearer(key), timeout=30)


def admin(server: RunningServer, method: str, path: str, **options: Any) -> httpx2.Response:
    return httpx2.request(method, f"{server.url}/admin/v1{path}", headers=bearer(ADMIN_KEY), timeout=30, **options)


def store_at(path: Path) -> StoreConfig:
    return StoreConfig(data_dir=str(path))
