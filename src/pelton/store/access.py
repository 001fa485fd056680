"""`AccessTables`: tenants and API keys in the database."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from sqlalchemy import Select, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from pelton.core.api_key import NewKey, Scope, make_key
from pelton.core.errors import InvalidRequestError
from pelton.core.request import DEFAULT_TENANT
from pelton.core.tenant import TenantSettings
from pelton.store.database import Database
from pelton.store.records import Access, KeyRecord, TenantRecord
from pelton.store.tables import access_version, api_keys, tenants

_LIMITS = ("requests_per_minute", "tokens_per_minute", "monthly_token_budget")
TENANT_FIELDS = tuple(f.name for f in fields(TenantRecord) if f.name not in ("tenant_id", "created_s"))


class AccessTables:
    """Every change makes `version` grow, in the same transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def version(self) -> int:
        async with self._database.read() as connection:
            return await _version(connection)

    async def load(self) -> Access:
        async with self._database.read() as connection:
            version = await _version(connection)
            keys = [_key(row) for row in await connection.execute(select(api_keys))]
            records = [TenantRecord(**row._mapping) for row in await connection.execute(select(tenants))]
        return Access(version, {key.key_id: key for key in keys}, {record.tenant_id: record for record in records})

    async def list_keys(self, tenant_id: str | None = None) -> list[KeyRecord]:
        """Oldest first."""
        query: Select[Any] = select(api_keys).order_by(api_keys.c.created_s)
        if tenant_id is not None:
            query = query.where(api_keys.c.tenant_id == tenant_id)
        async with self._database.read() as connection:
            return [_key(row) for row in await connection.execute(query)]

    async def create_key(
        self,
        tenant_id: str = DEFAULT_TENANT,
        *,
        name: str = "",
        scopes: Iterable[Scope] = (Scope.INFERENCE,),
        expires_s: float | None = None,
    ) -> tuple[KeyRecord, NewKey]:
        """The tenant is made where there is none of that name."""
        new = make_key()
        record = KeyRecord(
            key_id=new.key_id,
            tenant_id=tenant_id,
            name=name,
            secret_hash=new.secret_hash,
            scopes=frozenset(scopes),
            created_s=time.time(),
            expires_s=expires_s,
        )
        async with self._database.begin() as connection:
            await _make_tenant(connection, tenant_id)
            await _insert_key(connection, record)
            await _changed(connection)
        return record, new

    async def revoke_key(self, key_id: str) -> KeyRecord | None:
        """None: there is no such key. One that was revoked before stays as it was."""
        async with self._database.begin() as connection:
            record = await _find_key(connection, key_id)
            if record is None or record.revoked_s is not None:
                return record
            record = replace(record, revoked_s=time.time())
            values = {"revoked_s": record.revoked_s}
            await connection.execute(update(api_keys).where(api_keys.c.key_id == key_id).values(values))
            await _changed(connection)
        return record

    async def rotate_key(self, key_id: str, *, grace_s: float = 0.0) -> tuple[KeyRecord, NewKey] | None:
        """A new key on the terms of an old one, which ends after `grace_s`. None: the old one is not valid."""
        now_s = time.time()
        async with self._database.begin() as connection:
            old = await _find_key(connection, key_id)
            if old is None or not old.is_valid(now_s):
                return None
            new = make_key()
            record = replace(old, key_id=new.key_id, secret_hash=new.secret_hash, created_s=now_s)
            await _insert_key(connection, record)
            ends: dict[str, float] = {"revoked_s": now_s}
            if grace_s > 0:
                ends = {"expires_s": min(now_s + grace_s, old.expires_s or now_s + grace_s)}
            await connection.execute(update(api_keys).where(api_keys.c.key_id == key_id).values(ends))
            await _changed(connection)
        return record, new

    async def list_tenants(self) -> list[TenantRecord]:
        async with self._database.read() as connection:
            query = select(tenants).order_by(tenants.c.tenant_id)
            return [TenantRecord(**row._mapping) for row in await connection.execute(query)]

    async def set_tenant(self, tenant_id: str, changes: Mapping[str, Any]) -> TenantRecord:
        """Make a tenant, or change its terms. Raises `InvalidRequestError` for a value out of range."""
        async with self._database.begin() as connection:
            await _make_tenant(connection, tenant_id)
            row = (await connection.execute(select(tenants).where(tenants.c.tenant_id == tenant_id))).one()
            record = replace(TenantRecord(**row._mapping), **changes)
            check_tenant(record)
            if changes:
                await connection.execute(update(tenants).where(tenants.c.tenant_id == tenant_id).values(changes))
            await _changed(connection)
        return record


def check_tenant(record: TenantRecord) -> None:
    """Raises `InvalidRequestError`, or `ConfigError` for what the engine's settings refuse."""
    TenantSettings(**record.engine_settings)  # type: ignore[arg-type]
    for name in _LIMITS:
        value = getattr(record, name)
        if value is not None and not 0 < value < 2**53:
            raise InvalidRequestError(f"{name} is {value}; it must be positive, or null for no limit", param=name)


async def _version(connection: AsyncConnection) -> int:
    return int((await connection.execute(select(access_version.c.version))).scalar_one())


async def _changed(connection: AsyncConnection) -> None:
    await connection.execute(update(access_version).values(version=access_version.c.version + 1))


async def _make_tenant(connection: AsyncConnection, tenant_id: str) -> None:
    # The row of the version is locked first: two who make the same tenant come one after the other.
    await _changed(connection)
    known = await connection.execute(select(tenants.c.tenant_id).where(tenants.c.tenant_id == tenant_id))
    if known.first() is None:
        await connection.execute(insert(tenants).values(tenant_id=tenant_id, created_s=time.time()))


async def _insert_key(connection: AsyncConnection, record: KeyRecord) -> None:
    values = asdict(record) | {"scopes": " ".join(sorted(record.scopes))}
    await connection.execute(insert(api_keys).values(values))


async def _find_key(connection: AsyncConnection, key_id: str) -> KeyRecord | None:
    query = select(api_keys).where(api_keys.c.key_id == key_id).with_for_update()
    row = (await connection.execute(query)).first()
    return _key(row) if row is not None else None


def _key(row: Any) -> KeyRecord:
    values = dict(row._mapping)
    return KeyRecord(**values | {"scopes": frozenset(map(Scope, values["scopes"].split()))})
