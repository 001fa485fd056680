"""Deficit longest prefix match (arXiv 2501.14312): cached prefixes first, among tenants that have credit left.

Requests go in order of the prefix that the cache holds, from tenants whose deficit counter is positive;
once none is, every tenant that waits gets `quantum` more. A small quantum comes near to fair queueing, a
large one to plain longest prefix match. Only the first requests of a queue are compared, and one that has
waited for `MAX_WAIT_S` is not passed by longer matches any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from pelton.core.request import Request
from pelton.engine.policies.by_tenant import ByTenantPolicy, Tenant
from pelton.engine.policies.context import PolicyContext
from pelton.engine.policies.ordered_waiting import Key

MAX_WAIT_S = 30.0
MAX_NUM_COMPARED = 128  # requests in a step
MATCH_REFRESH_S = 0.25  # how old a prefix match may be


class DLPMPolicy(ByTenantPolicy):
    quantum = 4096.0

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._in_line: dict[str, Tenant] = {}
        self._granted: dict[str, float] = {}
        self._matches: dict[str, tuple[float, int]] = {}  # by request: when it was looked up, cached tokens

    def request_key(self, request: Request) -> Key:
        return (request.rank_time_s,)

    def enters(self, tenant: Tenant) -> None:
        self._in_line[tenant.tenant_id] = tenant
        self._granted.setdefault(tenant.tenant_id, tenant.virtual_service)

    def leaves(self, tenant: Tenant) -> None:
        del self._in_line[tenant.tenant_id]
        if self._granted[tenant.tenant_id] >= tenant.virtual_service:  # a debt is kept, credit is not
            del self._granted[tenant.tenant_id]

    def admit(self, request: Request, num_cached_tokens: int) -> None:
        self._matches.pop(request.request_id, None)
        super().admit(request, num_cached_tokens)

    def finish(self, request: Request) -> None:
        self._matches.pop(request.request_id, None)
        super().finish(request)

    def waiting(self) -> Iterator[Request]:
        self._charge_held_kv()
        refused: set[str] = set()
        has_granted = False
        while self._in_line:
            num_waiting = len(self)
            for request in self._candidates():
                tenant = self.tenants[request.tenant_id]
                if request.request_id in refused or not tenant.may_start or self._deficit(tenant) <= 0:
                    continue
                if not self._has_share(tenant, request):
                    continue
                yield request
                if request in tenant.waiting:
                    refused.add(request.request_id)
            if len(self) < num_waiting:
                has_granted = False
            elif has_granted:
                return
            else:
                self._grant()
                has_granted = True

    def _candidates(self) -> list[Request]:
        tenants = [tenant for tenant in self._in_line.values() if self._deficit(tenant) > 0][:MAX_NUM_COMPARED]
        num_each = MAX_NUM_COMPARED // max(1, len(tenants))
        now_s = self.context.clock.now_s()
        found = [
            (now_s - request.arrival_time_s < MAX_WAIT_S, -self._num_cached_tokens(request, now_s), request)
            for tenant in tenants
            for request in islice(tenant.waiting, num_each)
        ]
        found.sort(key=lambda entry: (entry[0], entry[1] if entry[0] else 0, entry[2].rank_time_s))
        return [request for _, _, request in found]

    def _num_cached_tokens(self, request: Request, now_s: float) -> int:
        looked_up_s, num_tokens = self._matches.get(request.request_id, (-MATCH_REFRESH_S, 0))
        if now_s - looked_up_s >= MATCH_REFRESH_S:
            num_tokens = self.context.num_cached_tokens(request)
            self._matches[request.request_id] = now_s, num_tokens
        return num_tokens

    def _deficit(self, tenant: Tenant) -> float:
        return self._granted[tenant.tenant_id] - tenant.virtual_service

    def _grant(self) -> None:
        """As many quanta as it takes until one tenant without credit has some again."""
        poor = [tenant for tenant in self._in_line.values() if self._deficit(tenant) <= 0]
        if poor:
            num_quanta = 1 + max(self._deficit(tenant) for tenant in poor) // -self.quantum
            for tenant in poor:
                self._granted[tenant.tenant_id] += num_quanta * self.quantum
