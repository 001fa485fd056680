"""What is told of sessions and tenants: values for the border."""

from __future__ import annotations

from dataclasses import dataclass

from pelton.core.events import TenantStats


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
class TenantInfo:
    """What one tenant has beside its requests."""

    tenant_id: str
    num_sessions: int = 0
    num_pinned_blocks: int = 0
    pinned_block_s_total: float = 0.0  # blocks x seconds that its pins have held


@dataclass(frozen=True, slots=True, kw_only=True)
class TenancyStats:
    """All tenants; asked for, not sent with every step."""

    service: tuple[TenantStats, ...] = ()  # the policy's accounts
    tenants: tuple[TenantInfo, ...] = ()
    fairness_gap: float = 0.0  # largest difference of virtual service between tenants with requests waiting
    num_sessions: int = 0
    num_pins: int = 0
    num_pins_ended_total: tuple[tuple[str, int], ...] = ()  # (reason, number)
