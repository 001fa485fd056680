"""`pelton keys` and `pelton usage`: real commands on a database that a server may be using."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.cli.run import pelton
from tests.serving.keys import admin, bearer, key_server, store_at
from tests.wait import wait_until


async def run_json(*arguments: str) -> Any:
    result = await pelton(*arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


async def test_a_key_is_made_rotated_and_revoked(tmp_path: Path) -> None:
    place = ("--data-dir", str(tmp_path))
    made = await pelton("keys", "create", "--tenant", "acme", "--name", "laptop", "--expires", "30d", *place)
    assert (made.code, made.out[:4]) == (0, "plt_"), made.err
    assert "cannot be shown again" in made.err
    (listed,) = await run_json("keys", "list", *place)
    assert (listed["tenant_id"], listed["name"], listed["scopes"], listed["status"]) == (
        "acme",
        "laptop",
        ["inference"],
        "active",
    )
    rotated = await run_json("keys", "rotate", made.out.strip(), *place)
    assert rotated["key"].startswith(f"plt_{rotated['id']}_")
    assert (await pelton("keys", "revoke", rotated["id"], *place)).code == 0
    statuses = [key["status"] for key in await run_json("keys", "list", *place)]
    assert statuses == ["revoked", "revoked"]
    assert (await pelton("keys", "rotate", rotated["id"], *place)).code == 2


async def test_a_running_server_takes_limits_over(tmp_path: Path) -> None:
    place = ("--data-dir", str(tmp_path))
    key = (await run_json("keys", "create", "--tenant", "acme", *place))["key"]
    with key_server(store_at(tmp_path)) as server:

        def status() -> int:
            body = {"prompt": "a", "max_tokens": 1}
            return httpx2.post(f"{server.url}/v1/completions", json=body, headers=bearer(key), timeout=30).status_code

        assert [status() for _ in range(3)] == [200] * 3
        limits = ("requests_per_minute=1", "weight=2.5", "max-num-running=3", "cache_group=team")
        (shown,) = await run_json("keys", "limits", "acme", *limits, *place)
        expected = {"requests_per_minute": 1, "weight": 2.5, "max_num_running": 3, "cache_group": "team"}
        assert {name: shown[name] for name in expected} == expected
        assert shown["monthly_token_budget"] is None
        wait_until(lambda: status() == 429)
        assert admin(server, "GET", "/tenants/acme").json()["weight"] == 2.5
        (shown,) = await run_json("keys", "limits", "acme", "requests_per_minute=none", "is_disabled=true", *place)
        assert (shown["requests_per_minute"], shown["weight"], shown["is_disabled"]) == (None, 2.5, True)
        wait_until(lambda: status() == 403)
    table = (await pelton("keys", "limits", *place)).out
    assert "requests per minute" in table
    assert "acme" in table


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("acme", "requests_per_minute"), "NAME=VALUE"),
        (("acme", "request_per_minute=5"), "did you mean 'requests_per_minute'"),
        (("acme", "requests_per_minute=many"), "requests_per_minute"),
        (("acme", "requests_per_minute=0"), "requests_per_minute"),
        (("acme", "weight=-1"), "weight"),
        (("acme", "max_kv_share=1.5"), "max_kv_share"),
        (("a b", "weight=1"), "tenant"),
        (("nobody",), "there is no tenant nobody"),
    ],
)
async def test_what_is_no_limit(tmp_path: Path, arguments: tuple[str, ...], problem: str) -> None:
    result = await pelton("keys", "limits", *arguments, "--data-dir", str(tmp_path))
    assert (result.code, result.out) == (2, "")
    assert problem in result.err
