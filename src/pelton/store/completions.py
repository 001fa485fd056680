"""Stored chat completions. Nobody finds another tenant's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from sqlalchemy import (
    Column,
    Double,
    Index,
    LargeBinary,
    String,
    Table,
    Text,
    and_,
    delete,
    insert,
    or_,
    select,
    update,
)

from pelton.store.database import Database
from pelton.store.stored_completion import StoredCompletion
from pelton.store.tables import metadata

chat_completions = Table(
    "chat_completions",
    metadata,
    Column("completion_id", String(64), primary_key=True),
    Column("tenant_id", String(128), nullable=False),
    Column("created_s", Double, nullable=False, index=True),
    Column("model", Text, nullable=False),
    Column("labels", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("messages", LargeBinary, nullable=False),
    Index("ix_chat_completions_tenant_id_created_s", "tenant_id", "created_s"),
)
_ROWS = chat_completions.c


class CompletionTable:
    """Every method raises `DatabaseError` where the database does not answer."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def insert(self, record: StoredCompletion, *, oldest_s: float) -> None:
        """Also drops what was made before `oldest_s`, whosesoever it is."""
        async with self._database.begin() as connection:
            await connection.execute(insert(chat_completions).values(asdict(record)))
            await connection.execute(delete(chat_completions).where(_ROWS.created_s < oldest_s))

    async def prune(self, tenant_id: str, max_completions: int) -> None:
        """Keep the latest of a tenant, and those that were made in the same moment as the last."""
        own = _ROWS.tenant_id == tenant_id
        newest = select(_ROWS.created_s).where(own).order_by(_ROWS.created_s.desc())
        async with self._database.begin() as connection:
            last = (await connection.execute(newest.offset(max_completions - 1).limit(1))).scalar_one_or_none()
            if last is not None:
                await connection.execute(delete(chat_completions).where(own, _ROWS.created_s < last))

    async def find(self, tenant_id: str, completion_id: str) -> StoredCompletion | None:
        query = select(chat_completions).where(_ROWS.completion_id == completion_id, _ROWS.tenant_id == tenant_id)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        return StoredCompletion(**row._mapping) if row is not None else None

    async def page(
        self,
        tenant_id: str,
        *,
        after: str | None,
        limit: int,
        newest_first: bool,
        model: str | None = None,
        labels: Sequence[str] = (),
    ) -> list[StoredCompletion]:
        """Up to `limit` in order of creation, from behind the one named `after`, with all of `labels`."""
        query = select(chat_completions).where(_ROWS.tenant_id == tenant_id)
        if model is not None:
            query = query.where(_ROWS.model == model)
        for label in labels:
            query = query.where(_ROWS.labels.contains(f" {label} ", autoescape=True))
        created, own_id = _ROWS.created_s, _ROWS.completion_id
        if after is not None:
            start = select(created).where(own_id == after, _ROWS.tenant_id == tenant_id).scalar_subquery()
            if newest_first:
                query = query.where(or_(created < start, and_(created == start, own_id < after)))
            else:
                query = query.where(or_(created > start, and_(created == start, own_id > after)))
        order = (created.desc(), own_id.desc()) if newest_first else (created, own_id)
        async with self._database.read() as connection:
            rows = await connection.execute(query.order_by(*order).limit(limit))
            return [StoredCompletion(**row._mapping) for row in rows]

    async def update(self, tenant_id: str, completion_id: str, body: bytes, labels: str) -> bool:
        """False: it was deleted meanwhile."""
        statement = update(chat_completions).where(_ROWS.completion_id == completion_id, _ROWS.tenant_id == tenant_id)
        async with self._database.begin() as connection:
            return (await connection.execute(statement.values(body=body, labels=labels))).rowcount > 0

    async def delete(self, tenant_id: str, completion_id: str) -> bool:
        """False: there was none."""
        statement = delete(chat_completions).where(_ROWS.completion_id == completion_id, _ROWS.tenant_id == tenant_id)
        async with self._database.begin() as connection:
            return (await connection.execute(statement)).rowcount > 0
