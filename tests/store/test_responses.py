"""Stored responses, in both databases: a tenant's own, as many and as long as is allowed."""

from __future__ import annotations

from dataclasses import replace

from pelton.store.database import Database
from pelton.store.responses import ResponseTable
from pelton.store.stored_response import StoredResponse

RECORD = StoredResponse(
    response_id="resp_1", tenant_id="acme", created_s=1000.0, body=b'{"a": 1}', input=b"[]", events=b"\0\xff"
)


async def test_a_tenant_finds_its_own(database: Database) -> None:
    table = ResponseTable(database)
    await table.insert(RECORD, oldest_s=0.0)
    assert await table.find("acme", "resp_1") == RECORD
    assert await table.find("other", "resp_1") is None
    await table.update(replace(RECORD, tenant_id="other", body=b"x"))
    assert not await table.delete("other", "resp_1")
    assert await table.find("acme", "resp_1") == RECORD
    changed = replace(RECORD, body=b"y", previous_response_id="resp_0")
    await table.update(changed)
    assert await table.find("acme", "resp_1") == changed
    assert await table.delete("acme", "resp_1")
    assert not await table.delete("acme", "resp_1")


async def test_old_ones_go(database: Database) -> None:
    table = ResponseTable(database)
    await table.insert(RECORD, oldest_s=0.0)
    await table.insert(replace(RECORD, response_id="resp_2", created_s=2000.0), oldest_s=1500.0)
    assert await table.find("acme", "resp_1") is None
    for index in range(3, 9):
        await table.insert(replace(RECORD, response_id=f"resp_{index}", created_s=2000.0 + index), oldest_s=0.0)
    await table.insert(replace(RECORD, response_id="resp_x", tenant_id="other"), oldest_s=0.0)
    await table.prune("acme", 4)
    kept = [index for index in range(2, 9) if await table.find("acme", f"resp_{index}") is not None]
    assert kept == [5, 6, 7, 8]
    assert await table.find("other", "resp_x") is not None


async def test_leases_are_renewed_while_it_runs(database: Database) -> None:
    table = ResponseTable(database)
    running = replace(RECORD, is_running=True, server_id="here", lease_until_s=5.0)
    await table.insert(running, oldest_s=0.0)
    await table.insert(replace(RECORD, response_id="resp_2"), oldest_s=0.0)
    await table.renew(["resp_1", "resp_2", "resp_3"], 9.0)
    assert await table.find("acme", "resp_1") == replace(running, lease_until_s=9.0)
    assert await table.find("acme", "resp_2") == replace(RECORD, response_id="resp_2")
