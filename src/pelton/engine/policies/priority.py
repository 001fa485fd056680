"""Strict priority: lower `Request.priority` first, then order of arrival; the lowest rank yields."""

from __future__ import annotations

from pelton.core.request import Request
from pelton.engine.policies.fcfs import FCFSPolicy
from pelton.engine.policies.ordered_waiting import Key


class PriorityPolicy(FCFSPolicy):
    def rank(self, request: Request) -> Key:
        return (request.priority, request.arrival_time_s)
