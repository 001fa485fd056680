"""Strict priority: lower `Request.priority` first, then order of arrival; the lowest rank yields."""

from __future__ import annotations

from pelton.core.request import Request
from pelton.engine.policies.by_tenant import ByTenantPolicy
from pelton.engine.policies.ordered_waiting import Key


class PriorityPolicy(ByTenantPolicy):
    def request_key(self, request: Request) -> Key:
        return (request.priority, request.arrival_time_s)
