"""Service that tenants got, as VTC counts it: prompt tokens computed for the first time, and output tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping

from pelton.core.batch import ScheduledBatch
from pelton.core.request import Request
from pelton.simulate.cost import StepShape

PROMPT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0


class ServiceLog:
    """A listener of `CostExecutor`. It counts by itself, from the batches, whatever a policy believes.

    `requests` are the scheduler's. Prompt tokens that came from the prefix cache, or are computed again after a
    preemption, are no service.
    """

    def __init__(self, requests: Mapping[str, Request]) -> None:
        self._requests = requests
        self._num_served: dict[str, int] = {}  # tokens of a request computed so far
        self._times_s: dict[str, list[float]] = {}
        self._totals: dict[str, list[float]] = {}

    def __call__(self, batch: ScheduledBatch, shape: StepShape, done_s: float) -> None:  # noqa: ARG002
        for request_id in batch.finished_ids:
            self._num_served.pop(request_id, None)
        for scheduled in batch.requests:
            request = self._requests[scheduled.request_id]
            start = max(scheduled.num_computed_tokens, self._num_served.get(scheduled.request_id, 0))
            end = scheduled.num_computed_tokens + len(scheduled.token_ids)
            self._num_served[scheduled.request_id] = max(start, end)
            num_prompt_tokens = max(0, min(end, request.num_prompt_tokens) - start)
            service = PROMPT_WEIGHT * num_prompt_tokens + OUTPUT_WEIGHT * scheduled.samples
            self._add(request.tenant_id, service, done_s)

    def _add(self, tenant_id: str, service: float, done_s: float) -> None:
        times, totals = self._times_s.setdefault(tenant_id, []), self._totals.setdefault(tenant_id, [])
        total = (totals[-1] if totals else 0.0) + service
        if times and times[-1] == done_s:
            totals[-1] = total
        else:
            times.append(done_s)
            totals.append(total)

    @property
    def tenant_ids(self) -> list[str]:
        return sorted(self._totals)

    def total(self, tenant_id: str, until_s: float) -> float:
        """Service of a tenant in the steps that were done by then."""
        index = bisect_right(self._times_s.get(tenant_id, []), until_s)
        return self._totals[tenant_id][index - 1] if index else 0.0
