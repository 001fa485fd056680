"""What is kept of a response: the protocol of its store, and one that lasts as long as the process."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import msgspec

from pelton.serving.openai.responses_api.objects import ResponseObject
from pelton.serving.openai.responses_api.requests import InputItem

MAX_BYTES_IN_MEMORY = 256 << 20


class StoredResponse(msgspec.Struct, kw_only=True):
    """`body` and `input` are JSON: the `ResponseObject`, and the items that were sent with it."""

    response_id: str
    tenant_id: str
    created_s: float
    body: bytes
    input: bytes
    previous_response_id: str | None = None
    is_running: bool = False
    lease_until_s: float = 0.0  # a running one whose server has not renewed this is dead
    events: bytes | None = None  # of a background response that was made to be streamed

    def response(self) -> ResponseObject:
        return msgspec.json.decode(self.body, type=ResponseObject)

    def input_items(self) -> list[InputItem]:
        return msgspec.json.decode(self.input, type=list[InputItem])

    @property
    def num_bytes(self) -> int:
        return len(self.body) + len(self.input) + len(self.events or b"")


class ResponseStore(Protocol):
    """Every call names the tenant: nobody finds another's."""

    async def put(self, record: StoredResponse) -> None: ...

    async def find(self, tenant_id: str, response_id: str) -> StoredResponse | None: ...

    async def delete(self, tenant_id: str, response_id: str) -> bool: ...

    async def renew(self, response_ids: Sequence[str], lease_until_s: float) -> None: ...


class MemoryStore:
    """Bounded: the oldest go first."""

    def __init__(self, max_bytes: int = MAX_BYTES_IN_MEMORY) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._records: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()

    async def put(self, record: StoredResponse) -> None:
        key = (record.tenant_id, record.response_id)
        await self.delete(*key)
        self._records[key] = record
        self._num_bytes += record.num_bytes
        while self._num_bytes > self._max_bytes:
            await self.delete(*next(iter(self._records)))

    async def find(self, tenant_id: str, response_id: str) -> StoredResponse | None:
        return self._records.get((tenant_id, response_id))

    async def delete(self, tenant_id: str, response_id: str) -> bool:
        record = self._records.pop((tenant_id, response_id), None)
        if record is not None:
            self._num_bytes -= record.num_bytes
        return record is not None

    async def renew(self, response_ids: Sequence[str], lease_until_s: float) -> None:
        for record in self._records.values():
            if record.response_id in response_ids:
                record.lease_until_s = lease_until_s


def now_s() -> float:
    return time.time()
