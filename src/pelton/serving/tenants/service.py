"""`TenantService`: keys, limits and usage of a running server, kept as the database has them.

A server that has no database runs none of this but a look, once a second, whether there is one now.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from pelton.core.errors import PeltonError
from pelton.core.sampling_params import SamplingParams
from pelton.engine.client import EngineClient, EngineState
from pelton.serving.logs import Logger
from pelton.serving.tenants.access import AccessControl
from pelton.serving.tenants.journal import journals, read_journal, try_claim
from pelton.serving.tenants.meter import Ticket, UsageMeter
from pelton.serving.tenants.problems import ended_key
from pelton.serving.tenants.quotas import ESTIMATED_OUTPUT_TOKENS, Quotas, month_begins_s
from pelton.store.opener import Store

if TYPE_CHECKING:
    from pelton.store.database import Database

# A change that another process made to keys or tenants holds within this time; one by the admin API at once.
POLL_S = 0.5
POLLS_PER_FOLD = 4
JOURNAL_FOLDER = "usage"
_log = Logger()


class TenantService:
    def __init__(self, client: EngineClient, store: Store, *, api_key: str | None, admin_key: str | None) -> None:
        self.access = AccessControl(api_key, admin_key)
        self.quotas = Quotas()
        self._client = client
        self._store = store
        self._meter: UsageMeter | None = None
        self._polling: asyncio.Task[None] | None = None
        self._told: tuple[int, int] | None = None  # (restarts of the engine, version) that the engine knows
        self._told_tenants: set[str] = set()
        self._gone_ids: list[str] = []  # folded journals whose files are gone
        self._folding = asyncio.Lock()
        self._reloading = asyncio.Lock()
        self._month_s = month_begins_s()

    # -- requests -----------------------------------------------------------------------------------

    def admit(
        self, tenant_id: str, key_id: str, prompts: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> Ticket | None:
        """Count a request against its tenant's limits. None: nobody counts here. Raises `LimitError`."""
        if self._meter is None:
            return None
        self._tell_engine()
        ticket = Ticket(tenant_id, key_id)
        tenant = self.access.tenant(tenant_id)
        if tenant is not None:
            num_each = ESTIMATED_OUTPUT_TOKENS if sampling.max_tokens is None else sampling.max_tokens
            num_output_tokens = num_each * sampling.n * len(prompts)
            ticket.reservation = self.quotas.reserve(tenant, sum(map(len, prompts)), num_output_tokens)
        return ticket

    def begin(self, ticket: Ticket | None, submission_id: str, num_prompt_tokens: int, n: int) -> None:
        """Right before a submission of the request is sent."""
        if ticket is not None and self._meter is not None:
            self._meter.begin(ticket, submission_id, num_prompt_tokens, n, self._client.num_restarts)

    def drop(self, ticket: Ticket | None, submission_id: str) -> None:
        """It was refused."""
        if ticket is not None and self._meter is not None:
            self._meter.drop(submission_id)

    # -- the server's life --------------------------------------------------------------------------

    async def start(self) -> None:
        """Waits for nothing; while there is a database and it has not been read, requests are refused."""
        self.access.is_loading = self._store.config.has_database
        self._polling = asyncio.create_task(self._poll())

    async def close(self) -> None:
        if self._polling is not None:
            self._polling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._polling
        if self._meter is not None:
            self._meter.close()
            self._meter = None
            try:
                await self._fold(await self._store.database())
            except (PeltonError, OSError) as error:
                _log.warning("the next start will bring usage into the database", problem=str(error))
        await self._store.close()

    async def database(self) -> Database:
        """Raises `DatabaseError`."""
        return await self._store.database()

    async def reload(self) -> None:
        """Take over what the database says of keys and tenants, at once."""
        from pelton.store.access import AccessTables

        database = await self._store.database()
        async with self._reloading:
            access = await AccessTables(database).load()
            if self._meter is None and (access.keys or access.tenants):
                await self._begin_metering(database)
            self.access.set(access)
        self._tell_engine()
        self._end_revoked()

    async def flush(self) -> None:
        """Bring usage so far into the database, for who wants to see it."""
        if self._meter is not None:
            await self._fold(await self._store.database())

    async def _poll(self) -> None:
        problem = ""
        for number in count():
            try:
                await self._look(number)
                problem = ""
            except (PeltonError, OSError) as error:
                if str(error) != problem:  # once, however long it lasts
                    problem = str(error)
                    _log.warning("keys and usage wait for the database", problem=problem)
            await asyncio.sleep(POLL_S if self._store.is_open else 2 * POLL_S)

    async def _look(self, number: int) -> None:
        if self._meter is not None:
            is_up = self._client.state in (EngineState.READY, EngineState.DRAINING)
            self._meter.drop_lost(self._client.num_restarts, is_engine_up=is_up)
        if not self._store.is_open and not self._store.config.has_database:
            return
        if self.access.is_loading or self._meter is None:
            await self.reload()
            return
        from pelton.store.access import AccessTables

        if await AccessTables(await self._store.database()).version() != self.access.access.version:
            await self.reload()
        self._tell_engine()
        self._end_revoked()
        if number % POLLS_PER_FOLD == 0:
            await self._fold(await self._store.database())

    # -- keys and the engine ------------------------------------------------------------------------

    def _end_revoked(self) -> None:
        """Requests under way whose key opens nothing any more end with an error, in band where they stream."""
        if self._meter is None:
            return
        keys = self.access.access.keys
        for ticket in list(self._meter.tickets()):
            record = keys.get(ticket.key_id)
            if record is not None and self.access.problem_of(record) is not None:
                for stream in ticket.streams:
                    stream.fail(ended_key())

    def _tell_engine(self) -> None:
        state = (self._client.num_restarts, self.access.access.version)
        if state == self._told or self._client.state is not EngineState.READY:
            return
        if self._told is not None and self._told[0] != state[0]:
            self._told_tenants.clear()
        changes = {tenant_id: tenant.engine_settings for tenant_id, tenant in self.access.access.tenants.items()}
        for tenant_id, settings in changes.items():
            if settings or tenant_id in self._told_tenants:
                self._client.set_tenant(tenant_id, settings)
        self._told_tenants = {tenant_id for tenant_id, settings in changes.items() if settings}
        self._told = state

    def cache_group(self, tenant_id: str) -> str | None:
        """Tenants of one group share prefixes; None: with nobody."""
        tenant = self.access.tenant(tenant_id)
        return tenant.cache_group if tenant is not None else None

    # -- usage --------------------------------------------------------------------------------------

    @property
    def _journals(self) -> Path:
        return self._store.config.data_path / JOURNAL_FOLDER

    async def _begin_metering(self, database: Database) -> None:
        """First what was left by servers that have ended, a killed one too: budgets know of it then."""
        await self._fold(database)
        self._meter = UsageMeter(self._journals, self.quotas, self._client.stats)
        self._client.add_listener(self._meter.take_update)

    async def _fold(self, database: Database) -> None:
        """Add journals to the database, each once: the mark that says so is set in the same transaction."""
        from pelton.store.usage import UsageTables

        tables = UsageTables(database)
        async with self._folding:
            if self._meter is not None and self._meter.has_news:
                await asyncio.to_thread(self._meter.rotate())
            elif self._meter is not None and self._month_s == month_begins_s():
                return
            for path in journals(self._journals):
                with try_claim(path) as is_ours:
                    if not is_ours:
                        continue
                    content = await asyncio.to_thread(read_journal, path)
                    if await tables.fold(path.stem, content, self._gone_ids):
                        self._gone_ids.clear()
                    path.unlink()
                    self._gone_ids.append(path.stem)
            self._month_s = month_begins_s()
            spent = await tables.tokens_since(self._month_s)
            unfolded = self._meter.unfolded if self._meter is not None else {}
            self.quotas.spent.clear()
            for tenant_id in {*spent, *unfolded}:
                self.quotas.spent[tenant_id] = spent.get(tenant_id, 0) + unfolded.get(tenant_id, 0)
