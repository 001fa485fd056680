"""Rates and budgets of tenants: counted before admission, corrected once the true usage is known."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pelton.serving.tenants.problems import LimitError
from pelton.store.records import TenantRecord

# Output tokens that a request without max_tokens is counted with until it ends.
ESTIMATED_OUTPUT_TOKENS = 256
MINUTE_S = 60.0


class TokenBucket:
    """`limit` a minute, refilled evenly, with a minute's worth as the burst.

    A bucket and not a window: no double burst at a window's border, exact in fractions, and what was counted too
    much can be given back. What was counted too little makes a debt, which later requests wait for.
    """

    __slots__ = ("_at_s", "_level", "limit")

    def __init__(self, limit: int, now_s: float) -> None:
        self.limit = limit
        self._level = float(limit)
        self._at_s = now_s

    def change(self, limit: int, now_s: float) -> None:
        """What was used stays used."""
        if limit != self.limit:
            used = self.limit - self.level(now_s)
            self.limit = limit
            self._level = limit - used

    def level(self, now_s: float) -> float:
        self._level = min(float(self.limit), self._level + (now_s - self._at_s) * self.limit / MINUTE_S)
        self._at_s = now_s
        return self._level

    def wait_s(self, count: int, now_s: float) -> float:
        """Until so many can be taken; 0: now. More than the limit can be taken from a full bucket."""
        missing = min(count, self.limit) - self.level(now_s)
        return max(0.0, missing * MINUTE_S / self.limit)

    def take(self, count: float, now_s: float) -> None:
        """A negative count gives back."""
        self._level = min(float(self.limit), self.level(now_s) - count)

    def reset_s(self, now_s: float) -> float:
        """Until it is full again."""
        return (self.limit - self.level(now_s)) * MINUTE_S / self.limit


@dataclass(slots=True)
class Reservation:
    """What a request was counted with."""

    tenant_id: str
    num_tokens: int
    headers: dict[str, str] = field(default_factory=dict)


class Quotas:
    """`spent` is what each tenant has used in this month (UTC), in tokens."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, int] = defaultdict(int)
        self._reserved: defaultdict[str, int] = defaultdict(int)
        self._requests: dict[str, TokenBucket] = {}
        self._tokens: dict[str, TokenBucket] = {}

    def reserve(self, tenant: TenantRecord, num_prompt_tokens: int, num_output_tokens: int) -> Reservation:
        """Raises `LimitError` where a limit is in the way, and counts nothing then."""
        now_s = time.monotonic()
        num_tokens = num_prompt_tokens + num_output_tokens
        requests = _bucket(self._requests, tenant.tenant_id, tenant.requests_per_minute, now_s)
        tokens = _bucket(self._tokens, tenant.tenant_id, tenant.tokens_per_minute, now_s)
        self._check_budget(tenant, num_prompt_tokens, _headers(requests, tokens, now_s))
        for bucket, count, kind in ((requests, 1, "requests"), (tokens, num_tokens, "tokens")):
            wait_s = bucket.wait_s(count, now_s) if bucket is not None else 0.0
            if bucket is not None and wait_s > 0:
                raise LimitError(
                    f"rate limit reached for tenant {tenant.tenant_id} on {kind} per minute: limit {bucket.limit}, "
                    f"{max(0, math.floor(bucket.level(now_s)))} left, {count} wanted; try again in {wait_s:.1f} s",
                    code="rate_limit_exceeded",
                    kind=kind,
                    retry_after_s=wait_s,
                    headers=_headers(requests, tokens, now_s),
                )
        if requests is not None:
            requests.take(1, now_s)
        if tokens is not None:
            tokens.take(num_tokens, now_s)
        self._reserved[tenant.tenant_id] += num_tokens
        return Reservation(tenant.tenant_id, num_tokens, _headers(requests, tokens, now_s))

    def settle(self, reservation: Reservation, num_tokens: int, *, was_admitted: bool) -> None:
        """The request has used so many tokens; one that was never admitted is not counted as a request either."""
        now_s = time.monotonic()
        tenant_id = reservation.tenant_id
        self._reserved[tenant_id] -= reservation.num_tokens
        if not self._reserved[tenant_id]:
            del self._reserved[tenant_id]
        tokens, requests = self._tokens.get(tenant_id), self._requests.get(tenant_id)
        if tokens is not None:
            tokens.take(num_tokens - reservation.num_tokens, now_s)
        if requests is not None and not was_admitted:
            requests.take(-1, now_s)

    def _check_budget(self, tenant: TenantRecord, num_prompt_tokens: int, headers: dict[str, str]) -> None:
        budget = tenant.monthly_token_budget
        if budget is None:
            return
        spent, reserved = self.spent[tenant.tenant_id], self._reserved.get(tenant.tenant_id, 0)
        if spent + reserved + num_prompt_tokens >= budget:
            raise LimitError(
                f"tenant {tenant.tenant_id} has used {spent} of its {budget} tokens of this month"
                + (f", and requests under way may use {reserved}" if reserved else ""),
                code="insufficient_quota",
                kind="insufficient_quota",
                retry_after_s=1.0 if spent + num_prompt_tokens < budget else month_ends_s() - time.time(),
                headers=headers,
            )


def _bucket(buckets: dict[str, TokenBucket], tenant_id: str, limit: int | None, now_s: float) -> TokenBucket | None:
    if limit is None:
        buckets.pop(tenant_id, None)
        return None
    bucket = buckets.get(tenant_id)
    if bucket is None:
        bucket = buckets[tenant_id] = TokenBucket(limit, now_s)
    bucket.change(limit, now_s)
    return bucket


def _headers(requests: TokenBucket | None, tokens: TokenBucket | None, now_s: float) -> dict[str, str]:
    """OpenAI's names: https://platform.openai.com/docs/guides/rate-limits"""
    headers = {}
    for bucket, kind in ((requests, "requests"), (tokens, "tokens")):
        if bucket is not None:
            headers[f"x-ratelimit-limit-{kind}"] = str(bucket.limit)
            headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.level(now_s))))
            headers[f"x-ratelimit-reset-{kind}"] = _format_s(bucket.reset_s(now_s))
    return headers


def _format_s(seconds: float) -> str:
    """As OpenAI writes a time: 6m0s, 1.5s, 120ms."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}m{math.ceil(rest)}s" if minutes else f"{rest:.3g}s"


def month_begins_s(time_s: float | None = None) -> int:
    """Of the month (UTC) that a time is in, in seconds since 1970."""
    now = datetime.fromtimestamp(time.time() if time_s is None else time_s, UTC)
    return int(datetime(now.year, now.month, 1, tzinfo=UTC).timestamp())


def month_ends_s(time_s: float | None = None) -> int:
    begins = datetime.fromtimestamp(month_begins_s(time_s), UTC)
    return int(begins.replace(year=begins.year + begins.month // 12, month=begins.month % 12 + 1).timestamp())
