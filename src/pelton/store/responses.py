"""Stored responses. Nobody finds another tenant's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from sqlalchemy import Boolean, Column, Double, Index, LargeBinary, String, Table, delete, insert, select, update

from pelton.store.database import Database
from pelton.store.stored_response import StoredResponse
from pelton.store.tables import metadata

responses = Table(
    "responses",
    metadata,
    Column("response_id", String(64), primary_key=True),
    Column("tenant_id", String(128), nullable=False),
    Column("created_s", Double, nullable=False, index=True),
    Column("body", LargeBinary, nullable=False),
    Column("input", LargeBinary, nullable=False),
    Column("previous_response_id", String(512)),
    Column("is_running", Boolean, nullable=False),
    Column("server_id", String(300), nullable=False),
    Column("lease_until_s", Double, nullable=False),
    Column("events", LargeBinary),
    Index("ix_responses_tenant_id_created_s", "tenant_id", "created_s"),
)


class ResponseTable:
    """Every method raises `DatabaseError` where the database does not answer."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def insert(self, record: StoredResponse, *, oldest_s: float) -> None:
        """Also drops what was made before `oldest_s`, whosesoever it is."""
        async with self._database.begin() as connection:
            await connection.execute(insert(responses).values(asdict(record)))
            await connection.execute(delete(responses).where(responses.c.created_s < oldest_s))

    async def prune(self, tenant_id: str, max_responses: int) -> None:
        """Keep the latest `max_responses` of a tenant, and those that were made in the same second as the last."""
        own = responses.c.tenant_id == tenant_id
        newest = select(responses.c.created_s).where(own).order_by(responses.c.created_s.desc())
        async with self._database.begin() as connection:
            last = (await connection.execute(newest.offset(max_responses - 1).limit(1))).scalar_one_or_none()
            if last is not None:
                await connection.execute(delete(responses).where(own, responses.c.created_s < last))

    async def update(self, record: StoredResponse) -> None:
        """Does nothing for one that was deleted meanwhile."""
        async with self._database.begin() as connection:
            await connection.execute(
                update(responses)
                .where(responses.c.response_id == record.response_id, responses.c.tenant_id == record.tenant_id)
                .values(asdict(record))
            )

    async def find(self, tenant_id: str, response_id: str) -> StoredResponse | None:
        query = select(responses).where(responses.c.response_id == response_id, responses.c.tenant_id == tenant_id)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        return StoredResponse(**row._mapping) if row is not None else None

    async def delete(self, tenant_id: str, response_id: str) -> bool:
        """False: there was none."""
        statement = delete(responses).where(responses.c.response_id == response_id, responses.c.tenant_id == tenant_id)
        async with self._database.begin() as connection:
            return (await connection.execute(statement)).rowcount > 0

    async def renew(self, response_ids: Sequence[str], lease_until_s: float) -> None:
        statement = update(responses).where(responses.c.response_id.in_(response_ids), responses.c.is_running)
        async with self._database.begin() as connection:
            await connection.execute(statement.values(lease_until_s=lease_until_s))
