"""First come, first served: order of arrival; the latest arrival yields (Orca, vLLM's default)."""

from __future__ import annotations

from pelton.core.request import Request
from pelton.engine.policies.by_tenant import ByTenantPolicy
from pelton.engine.policies.ordered_waiting import Key


class FCFSPolicy(ByTenantPolicy):
    """A preempted request keeps its arrival time and so returns to the front."""

    def request_key(self, request: Request) -> Key:
        return (request.rank_time_s,)
