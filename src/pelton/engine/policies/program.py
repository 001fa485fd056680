"""Least attained service between programs: PLAS and ATLAS of Autellix (arXiv 2502.13965).

A program's calls run at a level set by the service that its longest chain of finished calls has had: the sum
where calls follow each other (PLAS), the critical path where they run side by side (ATLAS, kept as one number).
Each level waits `LEVEL_DELAY_S` longer than the one before, and the last no longer than that times the
number of levels: a call is never overtaken by one that comes later than this. It replaces the promotion by
ratio of waiting to service, and needs no order to change while requests wait.
"""

from __future__ import annotations

from pelton.core.request import Request, RequestStatus
from pelton.engine.policies.by_tenant import INPUT_TOKEN_SERVICE, OUTPUT_TOKEN_SERVICE, ByTenantPolicy
from pelton.engine.policies.context import PolicyContext
from pelton.engine.policies.ordered_waiting import Key
from pelton.engine.policies.programs import Programs

FIRST_LEVEL_SERVICE = 2048.0
NUM_LEVELS = 8
LEVEL_DELAY_S = 15.0


class ProgramPolicy(ByTenantPolicy):
    def __init__(self, context: PolicyContext) -> None:
        self._programs = Programs()
        self._service_before: dict[str, float] = {}  # by request: its program's when it came
        super().__init__(context)

    def add(self, request: Request) -> None:
        self._service_before[request.request_id] = self._programs.of(request).service
        super().add(request)

    def finish(self, request: Request) -> None:
        before = self._service_before.pop(request.request_id)
        if request.status is not RequestStatus.WAITING:
            program = self._programs.of(request)
            program.service = max(program.service, before + _service_of(request))
        super().finish(request)

    def request_key(self, request: Request) -> Key:
        return (request.rank_time_s + LEVEL_DELAY_S * self._level(request), request.arrival_time_s)

    def _level(self, request: Request) -> int:
        """0 up to `FIRST_LEVEL_SERVICE`, then one more for each doubling."""
        ratio = self._service_before[request.request_id] / FIRST_LEVEL_SERVICE
        return min(int(ratio).bit_length(), NUM_LEVELS - 1)


def _service_of(request: Request) -> float:
    num_computed_prompt_tokens = max(0, request.num_charged_tokens - request.num_cached_tokens)
    return INPUT_TOKEN_SERVICE * num_computed_prompt_tokens + OUTPUT_TOKEN_SERVICE * request.num_output_tokens
