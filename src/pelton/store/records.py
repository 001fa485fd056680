"""Rows as values. Imports no database, so that a server may name them at its start."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pelton.core.api_key import Scope
from pelton.core.tenant import TenantSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    key_id: str
    tenant_id: str
    name: str
    secret_hash: str
    scopes: frozenset[Scope]
    created_s: float
    expires_s: float | None = None
    revoked_s: float | None = None

    def is_valid(self, now_s: float) -> bool:
        """Seconds since 1970."""
        return self.revoked_s is None and (self.expires_s is None or now_s < self.expires_s)

    def status(self, now_s: float) -> str:
        if self.revoked_s is not None:
            return "revoked"
        return "active" if self.is_valid(now_s) else "expired"


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRecord:
    """None: no limit, or what the engine's settings say."""

    tenant_id: str
    created_s: float = 0.0
    is_disabled: bool = False
    weight: float | None = None
    max_num_running: int | None = None
    max_num_waiting: int | None = None
    max_kv_share: float | None = None
    max_pin_share: float | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    monthly_token_budget: int | None = None
    cache_group: str | None = None  # tenants of one group share prefixes

    @property
    def engine_settings(self) -> dict[str, int | float]:
        """What of it the engine's `TenantSettings` are to be."""
        names = (setting.name for setting in fields(TenantSettings))
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True)
class Access:
    """All keys and tenants, as of one version."""

    version: int
    keys: dict[str, KeyRecord]
    tenants: dict[str, TenantRecord]


@dataclass(slots=True)
class Tokens:
    """What was used. Prompt tokens count the cached ones too."""

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0

    @property
    def num_total(self) -> int:
        return self.num_prompt_tokens + self.num_output_tokens

    def add(self, other: Tokens) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


# (hour, tenant, key): the hour in seconds since 1970, the key empty where none of ours was sent.
Account = tuple[int, str, str]


@dataclass(frozen=True, slots=True)
class JournalContent:
    """What one journal holds: usage, and the token counters (prompt, output) of each engine that made it."""

    usage: dict[Account, Tokens]
    engine_totals: dict[str, tuple[int, int]]
