"""`CompletionArchive`: the chat completions that were made with `store: true`."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from pelton.serving.errors import HTTPProblemError
from pelton.serving.openai.requests import ChatMessage
from pelton.serving.openai.responses import ChatCompletion, StoredChatCompletion
from pelton.store.opener import Store
from pelton.store.stored_completion import StoredCompletion

if TYPE_CHECKING:
    from pelton.store.completions import CompletionTable

PRUNE_EVERY = 64  # stored completions of a tenant


class CompletionArchive:
    """Used from one event loop. The database is opened with the first completion that is stored or looked for.

    Completions are kept for `retention_s`, and of a tenant the latest `max_per_tenant`.
    """

    def __init__(self, store: Store, *, retention_s: float, max_per_tenant: int) -> None:
        self._store = store
        self._retention_s = retention_s
        self._max_per_tenant = max_per_tenant
        self._num_saved: Counter[str] = Counter()

    async def table(self) -> CompletionTable:
        database = await self._store.database()
        from pelton.store.completions import CompletionTable

        return CompletionTable(database)

    async def save(
        self,
        tenant_id: str,
        answer: ChatCompletion,
        messages: Sequence[ChatMessage],
        metadata: Mapping[str, str] | None,
    ) -> None:
        """Raises `PeltonError` where the database does not answer."""
        now_s = time.time()
        kept = {name: getattr(answer, name) for name in answer.__struct_fields__}
        record = StoredCompletion(
            completion_id=answer.id,
            tenant_id=tenant_id,
            created_s=now_s,
            model=answer.model,
            labels=labels_text(metadata),
            body=msgspec.json.encode(StoredChatCompletion(**kept, metadata=dict(metadata or {}))),
            messages=msgspec.json.encode(messages),
        )
        table = await self.table()
        await table.insert(record, oldest_s=now_s - self._retention_s)
        self._num_saved[tenant_id] += 1
        if self._num_saved[tenant_id] % PRUNE_EVERY == 0:
            await table.prune(tenant_id, self._max_per_tenant)

    async def find(self, tenant_id: str, completion_id: str) -> StoredCompletion:
        """Raises `HTTPProblemError` (404)."""
        record = await (await self.table()).find(tenant_id, completion_id)
        if record is None:
            raise not_found(completion_id)
        return record


def labels_of(metadata: Mapping[str, str] | None) -> list[str]:
    """A word for each pair: what the database compares, whatever its collation."""
    pairs = (msgspec.json.encode(pair) for pair in (metadata or {}).items())
    return [hashlib.blake2b(pair, digest_size=12).hexdigest() for pair in pairs]


def labels_text(metadata: Mapping[str, str] | None) -> str:
    return "".join(f" {label} " for label in labels_of(metadata))


def decode_completion(record: StoredCompletion) -> StoredChatCompletion:
    return msgspec.json.decode(record.body, type=StoredChatCompletion)


def not_found(completion_id: str) -> HTTPProblemError:
    return HTTPProblemError(
        404,
        f"there is no stored chat completion {completion_id[:128]!r}; those made with store=true are kept",
        code="completion_not_found",
    )
