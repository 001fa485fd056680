"""What is known of agent programs: when each began and how much service its calls have had."""

from __future__ import annotations

from collections import OrderedDict

from pelton.core.request import Request

# Beyond these the longest silent program is forgotten: names come from clients.
MAX_NUM_PROGRAMS = 65_536


class Program:
    __slots__ = ("arrival_time_s", "service")

    def __init__(self, arrival_time_s: float) -> None:
        self.arrival_time_s = arrival_time_s  # of its first call
        self.service = 0.0  # along its longest chain of calls


class Programs:
    """By tenant and program id; a call without one is a program of its own."""

    def __init__(self) -> None:
        self._programs: OrderedDict[tuple[str, str], Program] = OrderedDict()

    def of(self, request: Request) -> Program:
        if request.program_id is None:
            return Program(request.arrival_time_s)
        key = request.tenant_id, request.program_id
        program = self._programs.get(key)
        if program is None:
            if len(self._programs) >= MAX_NUM_PROGRAMS:
                self._programs.popitem(last=False)
            program = self._programs[key] = Program(request.arrival_time_s)
        else:
            self._programs.move_to_end(key)
        return program

    def __len__(self) -> int:
        return len(self._programs)
