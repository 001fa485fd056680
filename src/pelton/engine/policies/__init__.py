"""Scheduling policies by name. A new one is one file and one row here."""

from __future__ import annotations

from collections.abc import Callable

from pelton.core.protocols import SchedulingPolicy
from pelton.engine.policies.context import PolicyContext
from pelton.engine.policies.fcfs import FCFSPolicy
from pelton.engine.policies.priority import PriorityPolicy

POLICIES: dict[str, Callable[[PolicyContext], SchedulingPolicy]] = {
    "fcfs": FCFSPolicy,
    "priority": PriorityPolicy,
}
