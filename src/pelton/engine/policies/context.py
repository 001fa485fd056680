"""What a policy may know of the engine around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pelton.core.protocols import Clock, MonotonicClock
from pelton.core.request import Request
from pelton.core.tenant import Tenants


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyContext:
    tenants: Tenants = field(default_factory=Tenants)
    clock: Clock = field(default_factory=MonotonicClock)
    num_blocks: int = 0  # of the KV cache; 0: shares of it are not bounded
    num_cached_tokens: Callable[[Request], int] = lambda _: 0  # tokens of a waiting request found in the prefix cache
    num_blocks_needed: Callable[[Request], int] = lambda _: 0  # KV blocks for all tokens of a waiting request
    kv_charge: float = 0.0  # service charged for one KV block held for one second
