"""Queries of files and batches; each names the tenant, but for the runner's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Row, Select, Table, and_, delete, func, insert, or_, select, update

from pelton.store.batch_records import UNFINISHED, BatchRecord, BatchStatus, FileRecord
from pelton.store.batch_tables import batches, files
from pelton.store.database import Database

_COLUMNS = ("batch_id", "tenant_id", "place", "created_s", "status", "input_file_id")


class FileTable:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, record: FileRecord) -> None:
        """Once: a second time changes nothing."""
        async with self._database.begin() as connection:
            known = await connection.execute(select(files.c.file_id).where(files.c.file_id == record.file_id))
            if known.first() is None:
                await connection.execute(insert(files).values(**msgspec.structs.asdict(record)))

    async def get(self, tenant_id: str, file_id: str, now_s: float) -> FileRecord | None:
        query = select(files).where(files.c.file_id == file_id, files.c.tenant_id == tenant_id, _is_alive(now_s))
        async with self._database.read() as connection:
            row = (await connection.execute(query)).first()
        return None if row is None else FileRecord(**row._mapping)

    async def page(
        self, tenant_id: str, now_s: float, *, after: str | None, limit: int, newest_first: bool, purpose: str | None
    ) -> list[FileRecord]:
        """Up to `limit` files in order of creation, from behind the one named `after`."""
        query = select(files).where(files.c.tenant_id == tenant_id, _is_alive(now_s))
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        query = _page(query, files, files.c.file_id, tenant_id, after, newest_first=newest_first).limit(limit)
        async with self._database.read() as connection:
            return [FileRecord(**row._mapping) for row in await connection.execute(query)]

    async def num_bytes(self, tenant_id: str) -> int:
        async with self._database.read() as connection:
            query = select(func.sum(files.c.num_bytes)).where(files.c.tenant_id == tenant_id)
            return int((await connection.execute(query)).scalar() or 0)

    async def delete(self, tenant_id: str, file_id: str) -> bool:
        async with self._database.begin() as connection:
            done = await connection.execute(
                delete(files).where(files.c.file_id == file_id, files.c.tenant_id == tenant_id)
            )
        return done.rowcount > 0

    async def delete_expired(self, place: str, now_s: float) -> list[str]:
        """Ids of files whose time has passed; their rows are gone, their contents are the caller's to remove."""
        is_expired = and_(files.c.place == place, files.c.expires_s <= now_s)
        async with self._database.begin() as connection:
            found = [row.file_id for row in await connection.execute(select(files.c.file_id).where(is_expired))]
            if found:
                await connection.execute(delete(files).where(is_expired))
        return found


class BatchTable:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, record: BatchRecord) -> None:
        async with self._database.begin() as connection:
            await connection.execute(insert(batches).values(**_values(record)))

    async def get(self, tenant_id: str, batch_id: str) -> BatchRecord | None:
        query = select(batches).where(batches.c.batch_id == batch_id, batches.c.tenant_id == tenant_id)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).first()
        return None if row is None else _record(row)

    async def page(self, tenant_id: str, *, after: str | None, limit: int) -> list[BatchRecord]:
        """The newest first."""
        query = select(batches).where(batches.c.tenant_id == tenant_id)
        query = _page(query, batches, batches.c.batch_id, tenant_id, after, newest_first=True).limit(limit)
        async with self._database.read() as connection:
            return [_record(row) for row in await connection.execute(query)]

    async def unfinished(self, place: str) -> list[BatchRecord]:
        """Of all tenants, the oldest first."""
        query = select(batches).where(batches.c.place == place, batches.c.status.in_(UNFINISHED))
        async with self._database.read() as connection:
            return [_record(row) for row in await connection.execute(query.order_by(batches.c.created_s))]

    async def num_unfinished(self, tenant_id: str, input_file_id: str | None = None) -> int:
        query = select(func.count()).where(batches.c.tenant_id == tenant_id, batches.c.status.in_(UNFINISHED))
        if input_file_id is not None:
            query = query.where(batches.c.input_file_id == input_file_id)
        async with self._database.read() as connection:
            return int((await connection.execute(query)).scalar() or 0)

    async def save(self, record: BatchRecord, *, only_from: Sequence[BatchStatus]) -> bool:
        """Write the whole record, unless its status is another than one of `only_from` by now."""
        async with self._database.begin() as connection:
            done = await connection.execute(
                update(batches)
                .where(batches.c.batch_id == record.batch_id, batches.c.status.in_(only_from))
                .values(**_values(record))
            )
        return done.rowcount > 0


def _is_alive(now_s: float) -> ColumnElement[bool]:
    return or_(files.c.expires_s.is_(None), files.c.expires_s > now_s)


def _page(
    query: Select[Any],
    table: Table,
    id_column: ColumnElement[str],
    tenant_id: str,
    after: str | None,
    *,
    newest_first: bool,
) -> Select[Any]:
    created = table.c.created_s
    if after is not None:
        start = select(created).where(id_column == after, table.c.tenant_id == tenant_id).scalar_subquery()
        if newest_first:
            query = query.where(or_(created < start, and_(created == start, id_column < after)))
        else:
            query = query.where(or_(created > start, and_(created == start, id_column > after)))
    order = (created.desc(), id_column.desc()) if newest_first else (created, id_column)
    return query.order_by(*order)


def _values(record: BatchRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in _COLUMNS} | {"document": msgspec.json.encode(record).decode()}


def _record(row: Row[Any]) -> BatchRecord:
    return msgspec.json.decode(row.document, type=BatchRecord)
