"""Keys and tenants in both databases."""

from __future__ import annotations

import asyncio
import time

import pytest
from sqlalchemy import text

from pelton.core.api_key import Scope, is_secret, make_key, split_key
from pelton.core.errors import ConfigError, InvalidRequestError
from pelton.store.access import AccessTables
from pelton.store.database import Database


async def test_a_key_is_made_shown_once_and_hashed(database: Database) -> None:
    access = AccessTables(database)
    record, new = await access.create_key("acme", name="a", scopes=[Scope.INFERENCE, Scope.METRICS], expires_s=4e9)
    loaded = (await access.load()).keys
    assert loaded == {record.key_id: record}
    assert record.scopes == {Scope.INFERENCE, Scope.METRICS}
    key_id, secret = split_key(new.text)
    assert key_id == record.key_id
    assert len(secret) == 43  # 256 bits
    assert is_secret(secret, record.secret_hash)
    assert not is_secret(secret[:-1], record.secret_hash)
    assert record.secret_hash != make_key().secret_hash
    async with database.read() as connection:
        rows = (await connection.execute(text("SELECT * FROM api_keys"))).all()
    assert secret not in str(rows)
    assert [tenant.tenant_id for tenant in await access.list_tenants()] == ["acme"]


async def test_every_change_moves_the_version(database: Database) -> None:
    access = AccessTables(database)
    versions = [await access.version()]
    record, _ = await access.create_key("acme")
    versions.append(await access.version())
    await access.set_tenant("acme", {"weight": 2.0})
    versions.append(await access.version())
    await access.rotate_key(record.key_id)
    versions.append(await access.version())
    assert versions == sorted(set(versions))
    await access.revoke_key(record.key_id)  # ended by the rotation: nothing changes
    assert await access.version() == versions[-1]


async def test_rotation(database: Database) -> None:
    access = AccessTables(database)
    old, _ = await access.create_key("acme", name="n", expires_s=time.time() + 1000)
    made = await access.rotate_key(old.key_id, grace_s=60)
    assert made is not None
    new, _ = made
    keys = (await access.load()).keys
    assert keys[old.key_id].is_valid(time.time())
    assert not keys[old.key_id].is_valid(time.time() + 61)
    assert (new.tenant_id, new.name, new.expires_s) == ("acme", "n", old.expires_s)
    assert await access.rotate_key("none") is None
    assert await access.revoke_key("none") is None
    await access.revoke_key(new.key_id)
    assert await access.rotate_key(new.key_id) is None
    assert (await access.load()).keys[new.key_id].status(time.time()) == "revoked"


async def test_limits(database: Database) -> None:
    access = AccessTables(database)
    await access.set_tenant("acme", {"tokens_per_minute": 100, "weight": 3.0, "cache_group": "g"})
    tenant = await access.set_tenant("acme", {"weight": None, "max_num_running": 2})
    assert (tenant.tokens_per_minute, tenant.weight, tenant.cache_group) == (100, None, "g")
    assert tenant.engine_settings == {"max_num_running": 2}
    for changes, error in (
        ({"tokens_per_minute": 0}, InvalidRequestError),
        ({"weight": -1.0}, ConfigError),
        ({"max_kv_share": 2.0}, ConfigError),
    ):
        with pytest.raises(error):
            await access.set_tenant("acme", changes)
    assert (await access.list_tenants())[0] == tenant


async def test_many_at_once(database: Database) -> None:
    access = AccessTables(database)
    await asyncio.gather(*(access.create_key("acme") for _ in range(8)))
    assert len(await access.list_keys("acme")) == 8
    assert len(await access.list_tenants()) == 1
