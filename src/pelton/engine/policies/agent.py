"""Fair between tenants; inside a tenant the program that began first; inside a program first come.

A program is served to its end before later ones: what it has in the KV cache is used before it is evicted,
and the mean time to finish a program falls (program-level FCFS of Continuum, arXiv 2511.02230, where least
attained service did worse on agents). A call is never overtaken by one that comes `MAX_AGE_S` later.
"""

from __future__ import annotations

from pelton.core.request import Request
from pelton.engine.policies.context import PolicyContext
from pelton.engine.policies.fair import FairPolicy
from pelton.engine.policies.ordered_waiting import Key
from pelton.engine.policies.programs import Programs

# How much a program's age can count against a newer one: the starvation bound.
MAX_AGE_S = 600.0


class AgentPolicy(FairPolicy):
    def __init__(self, context: PolicyContext) -> None:
        self._programs = Programs()
        super().__init__(context)

    def request_key(self, request: Request) -> Key:
        program = self._programs.of(request)
        start_s = max(program.arrival_time_s, request.arrival_time_s - MAX_AGE_S)
        return (start_s + request.rank_time_s - request.arrival_time_s, request.arrival_time_s)
