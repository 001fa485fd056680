"""`UsageTables`: what tenants and keys have used, by the hour."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, func, insert, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from pelton.store.database import Database
from pelton.store.records import JournalContent, Tokens
from pelton.store.tables import engine_runs, folded_journals, usage_hours

_COUNTS = ("num_requests", "num_prompt_tokens", "num_cached_tokens", "num_output_tokens")


class UsageTables:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._insert: Any = sqlite.insert if database.is_sqlite else postgresql.insert

    async def fold(self, journal_id: str, content: JournalContent, gone_ids: Sequence[str] = ()) -> bool:
        """Add a journal's usage; False, and nothing changed, where that was done before.

        `gone_ids` are folded journals whose files are no more: nobody can ask for them again.
        """
        async with self._database.begin() as connection:
            mark = self._insert(folded_journals).values(journal_id=journal_id, folded_s=time.time())
            marked = await connection.execute(mark.on_conflict_do_nothing())
            if marked.rowcount == 0:
                return False
            for (hour_s, tenant_id, key_id), tokens in content.usage.items():
                counts = {name: getattr(tokens, name) for name in _COUNTS}
                row = self._insert(usage_hours).values(hour_s=hour_s, tenant_id=tenant_id, key_id=key_id, **counts)
                sums = {name: usage_hours.c[name] + row.excluded[name] for name in _COUNTS}
                keys = list(usage_hours.primary_key.columns)
                await connection.execute(row.on_conflict_do_update(index_elements=keys, set_=sums))
            for run_id, totals in content.engine_totals.items():
                await self._set_totals(connection, run_id, totals)
            if gone_ids:
                await connection.execute(delete(folded_journals).where(folded_journals.c.journal_id.in_(gone_ids)))
        return True

    async def _set_totals(self, connection: AsyncConnection, run_id: str, totals: tuple[int, int]) -> None:
        await connection.execute(delete(engine_runs).where(engine_runs.c.run_id == run_id))
        values = {"num_prompt_tokens": totals[0], "num_output_tokens": totals[1]}
        await connection.execute(insert(engine_runs).values(run_id=run_id, updated_s=time.time(), **values))

    async def tokens_since(self, hour_s: int) -> dict[str, int]:
        """Prompt and output tokens by tenant."""
        total = func.sum(usage_hours.c.num_prompt_tokens + usage_hours.c.num_output_tokens)
        query = select(usage_hours.c.tenant_id, total).where(usage_hours.c.hour_s >= hour_s)
        async with self._database.read() as connection:
            rows = await connection.execute(query.group_by(usage_hours.c.tenant_id))
            return {tenant_id: int(count) for tenant_id, count in rows}

    async def report(
        self, since_s: float, until_s: float, *, by: Sequence[str] = ("tenant_id",), tenant_id: str | None = None
    ) -> list[tuple[tuple[Any, ...], Tokens]]:
        """Usage of the hours that begin in [since, until), summed by columns of `usage_hours`, in their order."""
        columns = [usage_hours.c[name] for name in by]
        sums = [func.sum(usage_hours.c[name]) for name in _COUNTS]
        query = select(*columns, *sums).where(usage_hours.c.hour_s >= since_s, usage_hours.c.hour_s < until_s)
        if tenant_id is not None:
            query = query.where(usage_hours.c.tenant_id == tenant_id)
        async with self._database.read() as connection:
            rows = await connection.execute(query.group_by(*columns).order_by(*columns))
            return [(tuple(row[: len(by)]), Tokens(*map(int, row[len(by) :]))) for row in rows]

    async def engine_totals(self) -> tuple[int, int]:
        """(prompt, output) tokens that all engines together said they had worked on."""
        query = select(func.sum(engine_runs.c.num_prompt_tokens), func.sum(engine_runs.c.num_output_tokens))
        async with self._database.read() as connection:
            prompt, output = (await connection.execute(query)).one()
        return int(prompt or 0), int(output or 0)
