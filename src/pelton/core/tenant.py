"""Who shares the server, and on what terms: weights and caps per tenant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from pelton.core.errors import ConfigError

# Names the settings of every tenant that has none of its own.
ANY_TENANT = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantSettings:
    """Caps are on what runs or waits at one time; None: no cap but the server's own."""

    weight: float = 1.0  # share of the service among tenants that want it
    max_num_running: int | None = None
    max_num_waiting: int | None = None
    max_kv_share: float = 1.0  # of the KV cache, held by running requests
    max_pin_share: float = 0.9  # of the KV cache, kept for sessions between their turns

    def __post_init__(self) -> None:
        if not 0.001 <= self.weight <= 1000:
            raise ConfigError(f"weight is {self.weight}; it must be between 0.001 and 1000")
        if self.max_num_running is not None and self.max_num_running < 1:
            raise ConfigError(f"max_num_running is {self.max_num_running}; it must be at least 1")
        if self.max_num_waiting is not None and self.max_num_waiting < 0:
            raise ConfigError(f"max_num_waiting is {self.max_num_waiting}; it must be at least 0")
        if not 0 < self.max_kv_share <= 1:
            raise ConfigError(f"max_kv_share is {self.max_kv_share}; it must be above 0 and at most 1")
        if not 0 <= self.max_pin_share <= 1:
            raise ConfigError(f"max_pin_share is {self.max_pin_share}; it must be between 0 and 1")


@dataclass(frozen=True, slots=True)
class Tenants:
    """Settings by tenant id: those of the start, and over them those that were changed since."""

    by_id: Mapping[str, TenantSettings] = field(default_factory=dict)
    others: TenantSettings = TenantSettings()
    _changed: dict[str, TenantSettings] = field(default_factory=dict)

    def of(self, tenant_id: str) -> TenantSettings:
        changed = self._changed.get(tenant_id)
        return changed if changed is not None else self.by_id.get(tenant_id, self.others)

    def change(self, tenant_id: str, changes: Mapping[str, int | float]) -> None:
        """What `changes` does not name is as it was at the start. Raises `ConfigError`."""
        settings = replace(self.by_id.get(tenant_id, self.others), **changes)  # type: ignore[arg-type]
        if changes:
            self._changed[tenant_id] = settings
        else:
            self._changed.pop(tenant_id, None)


def parse_tenants(texts: Iterable[str]) -> Tenants:
    """`NAME:key=value,key=value` for each tenant; the name `*` stands for all that are not named.

    A text without a name goes on with the tenant before it, so that lists split at commas mean the same.
    Raises `ConfigError`.
    """
    values: dict[str, dict[str, Any]] = {}
    name: str | None = None
    for piece in (piece.strip() for text in texts for piece in text.split(",")):
        own_name, _, setting_text = piece.rpartition(":")
        if own_name:
            if own_name in values:
                raise ConfigError(f"tenants: {own_name} is there twice")
            name = own_name
        if name is None:
            raise ConfigError(f"tenants: {piece!r} names no tenant; write NAME:key=value,key=value")
        key, value = _parse_setting(setting_text)
        values.setdefault(name, {})[key] = value
    others = TenantSettings(**values.pop(ANY_TENANT, {}))
    return Tenants({name: replace(others, **own) for name, own in values.items()}, others)


def _parse_setting(text: str) -> tuple[str, int | float]:
    key, _, value = text.partition("=")
    names = [setting.name for setting in fields(TenantSettings)]
    if key not in names:
        raise ConfigError(f"tenants: there is no setting {key!r}; there are {', '.join(names)}")
    number_type = int if key.startswith("max_num_") else float
    try:
        return key, number_type(value)
    except ValueError:
        raise ConfigError(f"tenants: {key} is {value!r}, which is not a number of its kind") from None
