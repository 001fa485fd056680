"""What is told of sessions and tenants: values for the border."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionInfo:
    """A session as its tenant may see it. Times in seconds before now, on the engine's clock."""

    session_id: str
    program_id: str
    is_inferred: bool  # found by its prefix, not named by the client
    age_s: float
    idle_s: float  # since its last turn arrived or ended
    num_turns: int  # ended
    num_running: int  # under way
    num_context_tokens: int  # of the longest turn remembered
    num_pinned_blocks: int
    pin_expires_in_s: float | None  # None: nothing is pinned


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantStats:
    """One tenant. `*_total` only grow; the rest are gauges."""

    tenant_id: str
    weight: float = 1.0
    service_total: float = 0.0  # weighted tokens as in VTC: computed prompt tokens + 2 x output tokens
    num_running: int = 0
    num_waiting: int = 0
    num_sessions: int = 0
    num_pinned_blocks: int = 0
    pinned_block_s_total: float = 0.0  # blocks x seconds that pins have held


@dataclass(frozen=True, slots=True, kw_only=True)
class TenancyStats:
    """All tenants; asked for, not sent with every step."""

    tenants: tuple[TenantStats, ...] = ()
    fairness_gap: float = 0.0  # largest difference in service by weight between tenants with requests waiting
    num_sessions: int = 0
    num_pins: int = 0
    num_pins_ended_total: tuple[tuple[str, int], ...] = ()  # (reason, number)
