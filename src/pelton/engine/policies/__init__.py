"""Scheduling policies by name. A new one is one file and one row here."""

from __future__ import annotations

from collections.abc import Callable

from pelton.core.protocols import SchedulingPolicy
from pelton.engine.policies.agent import AgentPolicy
from pelton.engine.policies.context import PolicyContext
from pelton.engine.policies.dlpm import DLPMPolicy
from pelton.engine.policies.fair import FairPolicy
from pelton.engine.policies.fcfs import FCFSPolicy
from pelton.engine.policies.priority import PriorityPolicy
from pelton.engine.policies.program import ProgramPolicy

POLICIES: dict[str, Callable[[PolicyContext], SchedulingPolicy]] = {
    "fcfs": FCFSPolicy,
    "priority": PriorityPolicy,
    "fair": FairPolicy,
    "dlpm": DLPMPolicy,
    "program": ProgramPolicy,
    "agent": AgentPolicy,
}
