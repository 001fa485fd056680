"""Fair between tenants: Virtual Token Counter (Sheng et al., OSDI 2024, arXiv 2401.00588), with weights.

Whoever has been served least is next; who was idle is lifted to the least served that waits, and so can
neither save up service nor be made to pay for its absence. Beyond the paper: prompts are charged as
their chunks are scheduled, not at admission, so that a short prompt goes before the rest of a long one;
cached tokens and tokens computed again after a preemption are not charged; when memory is short, requests
may pass one that finds no room until their tenant is `max_lead` ahead of that one's.
"""

from __future__ import annotations

from collections.abc import Sequence

from pelton.core.request import Request
from pelton.engine.policies.by_tenant import INPUT_TOKEN_SERVICE, ByTenantPolicy, Tenant
from pelton.engine.policies.context import PolicyContext
from pelton.engine.policies.ordered_waiting import Key

# Prompt tokens of a step while several tenants are about: who arrives waits for the step that runs, whatever its
# order after that. Smaller chunks cost prefill a fifth of its rate and more.
SHARED_STEP_TOKENS = 128
# A tenant is about for so long after its last request or prompt chunk.
ABOUT_S = 10.0


class FairPolicy(ByTenantPolicy):
    max_lead = 8192.0  # service that a tenant may get ahead of one whose request finds no room

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._last_left: Tenant | None = None
        self._latest = ""  # tenant that was seen last
        self._latest_s = self._other_s = -ABOUT_S  # when, and when another one was

    def request_key(self, request: Request) -> Key:
        return (request.rank_time_s,)

    def tenant_key(self, tenant: Tenant) -> Key:
        # Others of nearly equal service go before a second choice. Of equals, who has less under way is first.
        return (tenant.virtual_service + tenant.cursor * self.max_lead / 8, len(tenant.running))

    def add(self, request: Request) -> None:
        super().add(request)
        self._see(request.tenant_id)

    def charge_prefill(self, request: Request, num_tokens: int) -> None:
        super().charge_prefill(request, num_tokens)
        self._see(request.tenant_id)

    def _see(self, tenant_id: str) -> None:
        if tenant_id != self._latest:
            self._latest, self._other_s = tenant_id, self._latest_s
        self._latest_s = self.context.clock.now_s()

    def narrow(self, num_tokens: int) -> int:
        is_shared = self.context.clock.now_s() < self._other_s + ABOUT_S
        return min(num_tokens, SHARED_STEP_TOKENS) if is_shared else num_tokens

    def enters(self, tenant: Tenant) -> None:
        least = self._first() or self._last_left
        if least is not None:
            tenant.virtual_service = max(tenant.virtual_service, least.virtual_service)

    def leaves(self, tenant: Tenant) -> None:
        self._last_left = tenant

    def may_pass(self, tenant: Tenant, refused: Tenant) -> bool:
        return tenant.virtual_service <= refused.virtual_service + self.max_lead

    # -- chunks: by the service at which a prompt will be done (finish tags of weighted fair queueing) ---

    def order(self, running: list[Request]) -> None:
        super().order(running)
        firsts: dict[str, float] = {}
        for request in running:
            firsts.setdefault(request.tenant_id, self._finish_tag(request, request.num_remaining_tokens))
        running.sort(key=lambda request: firsts[request.tenant_id])

    def precedes(self, waiting: Request, running: Request) -> bool:
        if waiting.tenant_id == running.tenant_id:
            return super().precedes(waiting, running)
        num_wanted = waiting.num_tokens - self.context.num_cached_tokens(waiting)
        return self._finish_tag(waiting, num_wanted) < self._finish_tag(running, running.num_remaining_tokens)

    def _finish_tag(self, request: Request, num_tokens: int) -> float:
        tenant = self.tenants[request.tenant_id]
        return tenant.virtual_service + INPUT_TOKEN_SERVICE * num_tokens / tenant.settings.weight

    # -- victims ------------------------------------------------------------------------------------

    def choose_victim(self, running: Sequence[Request], beneficiary: Request) -> Request | None:
        """The tenant that holds most KV for its weight yields: of its requests, the one that loses least.

        A tenant that holds more than all others settles it among its own requests, where only later ones yield.
        """
        own = beneficiary.tenant_id
        shares = {name: self._kv_share(name) for name in {request.tenant_id for request in running}}
        largest = max(shares, key=lambda name: (shares[name], name == own), default=own)
        if largest != own and shares[largest] > self._kv_share(own):
            candidates = [request for request in running if request.tenant_id == largest]
        else:
            own_key = self.request_key(beneficiary)
            candidates = [r for r in running if r.tenant_id == own and self.request_key(r) > own_key]
        return min(candidates, key=lambda request: request.num_computed_tokens, default=None)

    def _kv_share(self, tenant_id: str) -> float:
        tenant = self.tenants[tenant_id]
        return sum([request.num_kv_tokens for request in tenant.running.values()]) / tenant.settings.weight
