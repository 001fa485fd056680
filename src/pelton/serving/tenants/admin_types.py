"""Bodies and answers of the admin API."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from pelton.core.api_key import Scope
from pelton.serving.caller import TENANT_PATTERN

TenantId = Annotated[str, Meta(pattern=f"^{TENANT_PATTERN}$")]
Limit = Annotated[int, Meta(ge=1, le=2**53 - 1)] | None | UnsetType
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)] | None | UnsetType
Share = Annotated[float, Meta(gt=0.0, le=1.0)] | None | UnsetType
MAX_TIME_S = 10**11
MAX_EXPIRY_S = 100 * 366 * 86400.0


class TenantChanges(Struct, kw_only=True, forbid_unknown_fields=True):
    """What is not there stays as it is; null: no limit, or what the server was started with."""

    is_disabled: bool | UnsetType = UNSET
    weight: Annotated[float, Meta(ge=0.001, le=1000.0)] | UnsetType | None = UNSET
    max_num_running: Annotated[int, Meta(ge=1, le=2**31 - 1)] | UnsetType | None = UNSET
    max_num_waiting: Count = UNSET
    max_kv_share: Share = UNSET
    max_pin_share: Annotated[float, Meta(ge=0.0, le=1.0)] | UnsetType | None = UNSET
    requests_per_minute: Limit = UNSET
    tokens_per_minute: Limit = UNSET
    monthly_token_budget: Limit = UNSET
    cache_group: Annotated[str, Meta(min_length=1, max_length=128)] | UnsetType | None = UNSET


class TenantItem(Struct, kw_only=True):
    id: str
    created: float
    is_disabled: bool
    weight: float | None
    max_num_running: int | None
    max_num_waiting: int | None
    max_kv_share: float | None
    max_pin_share: float | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    monthly_token_budget: int | None
    cache_group: str | None
    num_tokens_this_month: int
    object: Literal["tenant"] = "tenant"


class TenantList(Struct, kw_only=True):
    data: list[TenantItem]
    object: Literal["list"] = "list"


class NewKeyRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    tenant_id: TenantId = "default"
    name: Annotated[str, Meta(max_length=256)] = ""
    scopes: Annotated[tuple[Scope, ...], Meta(min_length=1, max_length=8)] = (Scope.INFERENCE,)
    expires_in_s: Annotated[float, Meta(gt=0.0, le=MAX_EXPIRY_S)] | None = None


class RotateKeyRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    grace_s: Annotated[float, Meta(ge=0.0, le=MAX_EXPIRY_S, description="How long the old key still works.")] = 0.0


class KeyItem(Struct, kw_only=True):
    id: str
    tenant_id: str
    name: str
    scopes: list[Scope]
    status: Literal["active", "expired", "revoked"]
    created: float
    expires: float | None
    revoked: float | None
    key: str | UnsetType = UNSET  # in the answer to its making only
    object: Literal["api_key"] = "api_key"


class KeyList(Struct, kw_only=True):
    data: list[KeyItem]
    object: Literal["list"] = "list"


class UsageQuery(Struct, kw_only=True):
    """Hours that begin in [start_time, end_time), in seconds since 1970."""

    start_time: Annotated[int, Meta(ge=0, le=MAX_TIME_S)] = 0
    end_time: Annotated[int, Meta(ge=0, le=MAX_TIME_S)] = MAX_TIME_S
    group_by: Annotated[str, Meta(pattern=r"^(tenant|key|hour)(,(tenant|key|hour)){0,2}$")] = "tenant,key"
    tenant_id: TenantId | UnsetType = UNSET


class UsageRow(Struct, kw_only=True):
    tenant_id: str | UnsetType = UNSET
    key_id: str | UnsetType = UNSET
    hour: int | UnsetType = UNSET  # its start, in seconds since 1970
    num_requests: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int


class EngineTotals(Struct, kw_only=True):
    """What the engines' own counters came to; the rows of all tenants and of all time add up to it."""

    num_prompt_tokens: int
    num_output_tokens: int


class UsageReport(Struct, kw_only=True):
    data: list[UsageRow]
    engine: EngineTotals
    object: Literal["list"] = "list"
