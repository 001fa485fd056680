"""`Load`: what waits for its first token, by tenant, and how soon a new request could have its own."""

from __future__ import annotations

from collections import Counter

from pelton.core.request import Request
from pelton.engine.kv.costs import KVCosts
from pelton.engine.service_rate import ServiceRate

# What a step of a few tokens took says little of one of many: most of it may have been the step's own.
_MOST_EXTRAPOLATED = 8


class Load:
    """Estimates are lower bounds: decodes that share the steps and growing contexts cost more than is counted."""

    def __init__(self, costs: KVCosts, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.rate = ServiceRate()
        self.num_waiting: Counter[str] = Counter()  # by tenant: not admitted yet
        self._costs = costs
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: dict[str, str] = {}  # request id -> tenant
        self.pending: dict[str, tuple[str, int]] = {}  # request id -> (tenant, prompt tokens to compute)
        self._pending_by_tenant: Counter[str] = Counter()

    def add(self, request: Request, num_tokens: int) -> None:
        """A request is queued with about `num_tokens` tokens to compute before its first own token."""
        tenant_id = request.tenant_id
        self._waiting[request.request_id] = tenant_id
        self.num_waiting[tenant_id] += 1
        if num_tokens > 0:
            self.pending[request.request_id] = (tenant_id, num_tokens)
            self._pending_by_tenant[tenant_id] += num_tokens

    def admitted(self, request_id: str) -> None:
        """It waits no longer; its prompt is still to be computed."""
        tenant_id = self._waiting.pop(request_id, None)
        if tenant_id is not None:
            _subtract(self.num_waiting, tenant_id, 1)

    def computed(self, request_id: str, num_tokens: int) -> None:
        """A step has computed so many prompt tokens of it."""
        pending = self.pending.pop(request_id, None)
        if pending is None:
            return
        tenant_id, num_left = pending
        _subtract(self._pending_by_tenant, tenant_id, min(num_tokens, num_left))
        if num_tokens < num_left:
            self.pending[request_id] = (tenant_id, num_left - num_tokens)

    def remove(self, request_id: str) -> None:
        """It has ended."""
        self.admitted(request_id)
        if request_id in self.pending:
            self.computed(request_id, self.pending[request_id][1])

    def first_token_s(self, tenant_id: str, num_tokens: int, num_running: int, now_s: float) -> float | None:
        """Seconds until a new request of `num_tokens` prompt tokens could have its first token; None: unknown.

        What waits ahead of it is all that waits, or if that is less, its tenant's own times the number of tenants:
        a fair policy serves them in turn.
        """
        num_tenants = len(self._pending_by_tenant.keys() | {tenant_id})
        total, own = self._pending_by_tenant.total(), self._pending_by_tenant[tenant_id]
        num_ahead = min(total, own * num_tenants) + num_tokens
        if self._costs.prefill.most_tokens * _MOST_EXTRAPOLATED < min(num_ahead, self._max_num_batched_tokens):
            return None
        prefill = self._costs.prefill.coefficients
        compute_s = prefill.token_s * num_ahead + prefill.step_s * (num_ahead / self._max_num_batched_tokens)
        if num_running < self._max_num_seqs:
            return compute_s
        num_waiting_ahead = min(
            self.num_waiting.total(), self.num_waiting[tenant_id] * len({*self.num_waiting, tenant_id})
        )
        return max(compute_s, self.rate.expected_s(num_waiting_ahead + 1, now_s) or 0.0)


def _subtract(counts: Counter[str], key: str, number: int) -> None:
    counts[key] -= number
    if counts[key] <= 0:
        del counts[key]
