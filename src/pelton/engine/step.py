"""What the scheduler writes on: the step that is being made, and counters."""

from __future__ import annotations

from dataclasses import dataclass, field

from pelton.core.batch import KVOp, ScheduledRequest
from pelton.core.request import Request

# A request, the positions [start, end) that a step computes of it, and whether it samples.
Row = tuple[Request, int, int, bool]


@dataclass(slots=True)
class SchedulerCounters:
    """Only grow; read by the engine's statistics."""

    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    num_prompt_tokens: int = 0


@dataclass(slots=True)
class Step:
    """The batch being made."""

    num_budget_tokens: int
    scheduled: list[ScheduledRequest] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)  # of each, what the scheduler wants to know when it is done
    kv_ops: list[KVOp] = field(default_factory=list)
    chunks: list[Request] = field(default_factory=list)  # running requests that want, or wanted, more than one token
    is_closed: bool = False  # takes no more requests
    has_refused: bool = False  # a waiting request found no room

    def start_of(self, request: Request) -> int:
        """The first position that is not computed before this step. Linear in the step."""
        return next((row[1] for row in self.rows if row[0] is request), request.num_computed_tokens)

    def withdraw(self, request: Request) -> Row | None:
        """Take a request out of the step; None: it is not in it."""
        index = next((index for index, row in enumerate(self.rows) if row[0] is request), None)
        if index is None:
            return None
        del self.scheduled[index]
        return self.rows.pop(index)

    def has_progressed(self, request: Request) -> bool:
        """Whether more of it is computed than when it was last preempted, or it never was."""
        if not request.num_preemptions:
            return True
        return (
            request.num_computed_tokens > request.num_lost_tokens and self.start_of(request) > request.num_lost_tokens
        )
