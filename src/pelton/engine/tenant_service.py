"""`TenantService`: what every tenant was given, whatever the policy, and how far apart they are.

Virtual counters as in VTC (arXiv 2401.00588), kept beside the policy so that the gap is seen under one that is
not fair, too: service by weight, lifted to the others' level when a tenant comes back from idling.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from pelton.core.tenant import Tenants

PROMPT_TOKEN_SERVICE = 1.0
OUTPUT_TOKEN_SERVICE = 2.0
MAX_TENANTS = 1024


@dataclass(slots=True)
class _Service:
    total: float = 0.0
    counter: float = 0.0  # by weight, lifted
    pinned_block_s: float = 0.0


class TenantService:
    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants
        self._services: OrderedDict[str, _Service] = OrderedDict()  # least recently arrived first
        self._num_alive: Counter[str] = Counter()
        self._last_counter = 0.0  # of the tenant that left last

    def arrived(self, tenant_id: str) -> None:
        service = self._services.setdefault(tenant_id, _Service())
        self._services.move_to_end(tenant_id)
        if not self._num_alive[tenant_id]:
            others = [self._services[other].counter for other in self._num_alive if other != tenant_id]
            service.counter = max(service.counter, min(others, default=self._last_counter))
        self._num_alive[tenant_id] += 1
        if len(self._services) > MAX_TENANTS:
            idle = next((other for other in self._services if other not in self._num_alive), None)
            if idle is not None:
                del self._services[idle]

    def left(self, tenant_id: str) -> None:
        self._num_alive[tenant_id] -= 1
        if not self._num_alive[tenant_id]:
            del self._num_alive[tenant_id]
            self._last_counter = self._services[tenant_id].counter

    def served(self, tenant_id: str, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """A step has computed so many tokens of the prompt, and so many of the output."""
        service = self._services[tenant_id]
        amount = PROMPT_TOKEN_SERVICE * num_prompt_tokens + OUTPUT_TOKEN_SERVICE * num_output_tokens
        service.total += amount
        service.counter += amount / self._tenants.of(tenant_id).weight

    def pinned(self, tenant_id: str, num_block_seconds: float) -> None:
        if tenant_id in self._services:
            self._services[tenant_id].pinned_block_s += num_block_seconds

    def gap(self, waiting_ids: Iterable[str]) -> float:
        """Largest difference between the counters of tenants that have requests waiting."""
        counters = [self._services[tenant_id].counter for tenant_id in waiting_ids if tenant_id in self._services]
        return max(counters) - min(counters) if counters else 0.0

    def totals(self) -> dict[str, tuple[float, float]]:
        """Tenant -> (service, block seconds pinned)."""
        return {tenant_id: (service.total, service.pinned_block_s) for tenant_id, service in self._services.items()}
