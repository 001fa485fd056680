"""Rates, budgets and quotas of tenants over HTTP: statuses, headers, and what is counted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from pelton.core.api_key import Scope
from pelton.serving.tenants.problems import LimitError
from pelton.serving.tenants.quotas import Quotas, TokenBucket, _format_s, month_begins_s, month_ends_s
from pelton.store.records import TenantRecord
from tests.serving.keys import admin, complete, key_server, store_at
from tests.serving.make import RunningServer

del Scope


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with key_server(store_at(tmp_path_factory.mktemp("store"))) as server:
        yield server


def tenant_with(server: RunningServer, name: str, **limits: Any) -> str:
    key: str = admin(server, "POST", "/keys", json={"tenant_id": name}).json()["key"]
    assert admin(server, "PATCH", f"/tenants/{name}", json=limits).status_code == 200
    return key


def test_requests_per_minute(server: RunningServer) -> None:
    key = tenant_with(server, "rpm", requests_per_minute=3)
    free = tenant_with(server, "free")
    for left in (2, 1, 0):
        headers = complete(server, key).headers
        assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("3", str(left))
    refused = complete(server, key)
    assert refused.status_code == 429
    assert refused.json()["error"] | {"message": ""} == {
        "message": "",
        "type": "requests",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.headers["x-ratelimit-reset-requests"].endswith("s")
    assert complete(server, free).status_code == 200
    with pytest.raises(openai.RateLimitError) as error:
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0).completions.create(
            model="scripted", prompt="a"
        )
    assert error.value.code == "rate_limit_exceeded"
    # Changed while the server runs: what was used stays used.
    admin(server, "PATCH", "/tenants/rpm", json={"requests_per_minute": 5})
    assert [complete(server, key).status_code for _ in range(3)] == [200, 200, 429]
    admin(server, "PATCH", "/tenants/rpm", json={"requests_per_minute": None})
    assert "x-ratelimit-limit-requests" not in complete(server, key).headers


def test_tokens_per_minute_are_corrected_afterwards(server: RunningServer) -> None:
    key = tenant_with(server, "tpm", tokens_per_minute=1000)
    first = complete(server, key, max_tokens=900)  # counted as 910, used 10 + the scripted answer of 57 and its end
    used = first.json()["usage"]["total_tokens"]
    assert used < 100
    assert first.headers["x-ratelimit-remaining-tokens"] == "90"
    second = complete(server, key, max_tokens=500)
    assert second.status_code == 200
    assert int(second.headers["x-ratelimit-remaining-tokens"]) >= 1000 - used - 510
    assert complete(server, key, max_tokens=980).status_code == 429


def test_a_refused_request_costs_nothing(server: RunningServer) -> None:
    key = tenant_with(server, "careful", tokens_per_minute=10_000, requests_per_minute=10)
    assert complete(server, key, max_tokens=5000).status_code == 400  # longer than the context
    answer = complete(server, key)
    assert answer.headers["x-ratelimit-remaining-requests"] == "9"
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) >= 9_985


def test_a_monthly_budget(server: RunningServer) -> None:
    key = tenant_with(server, "poor", monthly_token_budget=40)
    assert [complete(server, key).status_code for _ in range(3)] == [200, 200, 429]  # 15 each; a prompt of 10 waits
    refused = complete(server, key)
    assert (refused.json()["error"]["code"], refused.json()["error"]["type"]) == ("insufficient_quota",) * 2
    assert refused.headers["x-should-retry"] == "false"
    assert 1 <= int(refused.headers["retry-after"]) <= 31 * 86400
    assert admin(server, "GET", "/tenants/poor").json()["num_tokens_this_month"] == 30
    admin(server, "PATCH", "/tenants/poor", json={"monthly_token_budget": 1000})
    assert complete(server, key).status_code == 200


def test_caps_reach_the_engine_while_it_runs(server: RunningServer) -> None:
    key = tenant_with(server, "small", max_num_running=1, max_num_waiting=1)
    refused = complete(server, key, n=3)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    admin(server, "PATCH", "/tenants/small", json={"max_num_waiting": None})
    assert complete(server, key, n=3).status_code == 200


def test_the_bucket() -> None:
    bucket = TokenBucket(60, 0.0)
    assert bucket.wait_s(60, 0.0) == 0
    bucket.take(60, 0.0)
    assert bucket.wait_s(10, 0.0) == pytest.approx(10)
    assert bucket.level(30.0) == pytest.approx(30)
    bucket.take(45, 30.0)  # a debt
    assert bucket.wait_s(1, 30.0) == pytest.approx(16)
    bucket.take(-45, 30.0)
    assert bucket.wait_s(1000, 60.0) == 0  # more than a minute's worth waits for a full bucket only
    assert bucket.level(1e6) == 60
    bucket.take(20, 1e6)
    bucket.change(30, 1e6)
    assert bucket.level(1e6) == 10


def test_what_is_reserved_counts_until_it_is_settled() -> None:
    quotas, tenant = Quotas(), TenantRecord(tenant_id="a", monthly_token_budget=100, requests_per_minute=10)
    first = quotas.reserve(tenant, 10, 80)
    with pytest.raises(LimitError) as error:
        quotas.reserve(tenant, 10, 1)
    assert error.value.retry_after_s == 1.0  # the other may use less
    quotas.settle(first, 0, was_admitted=False)
    assert quotas.reserve(tenant, 10, 1).headers["x-ratelimit-remaining-requests"] == "9"
    quotas.spent["a"] = 100
    with pytest.raises(LimitError) as error:
        quotas.reserve(tenant, 1, 1)
    assert error.value.retry_after_s == pytest.approx(month_ends_s() - time.time(), abs=5)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0121, "13ms"), (1.5, "1.5s"), (59.0, "59s"), (60.0, "1m0s"), (361.2, "6m2s")]
)
def test_times_in_headers(seconds: float, text: str) -> None:
    assert _format_s(seconds) == text


def test_months() -> None:
    assert month_begins_s(1_795_305_600) == 1_793_491_200  # 22 November 2026
    assert month_ends_s(1_795_305_600) == 1_796_083_200
    assert month_ends_s(1_798_000_000) == 1_798_761_600  # December ends with the year
