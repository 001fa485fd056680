"""Journals are added to the database, each once, in both databases."""

from __future__ import annotations

import asyncio

from sqlalchemy import text

from pelton.store.database import Database
from pelton.store.records import JournalContent, Tokens
from pelton.store.usage import UsageTables

HOUR_S = 3600


def content(output: int, run_id: str = "run") -> JournalContent:
    usage = {(HOUR_S, "acme", "k"): Tokens(1, 10, 4, output), (2 * HOUR_S, "acme", ""): Tokens(1, 1, 0, 1)}
    return JournalContent(usage, {run_id: (11, output + 1)})


async def test_a_journal_counts_once(database: Database) -> None:
    tables = UsageTables(database)
    folds = await asyncio.gather(*(tables.fold("one", content(5)) for _ in range(4)))
    assert sorted(folds) == [False, False, False, True]
    assert await tables.fold("two", content(7, "other"), ["one"])
    rows = await tables.report(0, 1e11, by=["tenant_id", "key_id"])
    assert rows == [(("acme", ""), Tokens(2, 2, 0, 2)), (("acme", "k"), Tokens(2, 20, 8, 12))]
    assert await tables.tokens_since(2 * HOUR_S) == {"acme": 4}
    assert await tables.engine_totals() == (22, 14)
    async with database.read() as connection:
        assert (await connection.execute(text("SELECT journal_id FROM folded_journals"))).all() == [("two",)]


async def test_the_totals_of_a_run_are_the_latest(database: Database) -> None:
    tables = UsageTables(database)
    await tables.fold("a", JournalContent({}, {"run": (1, 2)}))
    await tables.fold("b", JournalContent({}, {"run": (10, 20)}))
    assert await tables.engine_totals() == (10, 20)


async def test_report_by_hour_and_tenant(database: Database) -> None:
    tables = UsageTables(database)
    await tables.fold("a", content(5))
    rows = await tables.report(HOUR_S, 2 * HOUR_S, by=["hour_s", "tenant_id"])
    assert rows == [((HOUR_S, "acme"), Tokens(1, 10, 4, 5))]
    assert await tables.report(0, 1e11, by=["tenant_id"], tenant_id="other") == []
