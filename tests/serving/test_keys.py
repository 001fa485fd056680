"""API keys over HTTP: who comes in, as whom, and what ends when a key does."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from pelton.core.api_key import Scope
from pelton.store.config import StoreConfig
from tests.serving.keys import (
    ADMIN_KEY,
    PROMPT,
    admin,
    bearer,
    complete,
    key_server,
    new_key,
    store_at,
    tables,
)
from tests.serving.make import RunningServer
from tests.wait import wait_until


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StoreConfig:
    config = store_at(tmp_path_factory.mktemp("store"))
    asyncio.run(new_key(config))  # with a key, from its start
    return config


@pytest.fixture(scope="module")
def server(store: StoreConfig) -> Iterator[RunningServer]:
    with key_server(store) as server:
        yield server


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, StoreConfig]]:
    config = store_at(tmp_path_factory.mktemp("slow"))
    asyncio.run(new_key(config))
    with key_server(config, delay_s=0.05) as server:
        yield server, config


async def test_keys_come_in_and_nobody_else(server: RunningServer, store: StoreConfig) -> None:
    key_id, key = await new_key(store)
    wait_until(lambda: complete(server, key).status_code == 200)
    wrong = f"{key[:-1]}{'A' if key[-1] != 'A' else 'B'}"
    for sent in (wrong, key_id, f"plt_{key_id}_", "plt__", "x", f"plt_{'0' * 16}_{key.split('_', 2)[2]}"):
        response = complete(server, sent)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.json()["error"]["type"] == "invalid_request_error"
    for headers in ({}, {"authorization": key}, {"authorization": "Bearer"}, {"authorization": f"Basic {key}"}):
        assert httpx2.post(f"{server.url}/v1/completions", json=PROMPT, headers=headers).status_code == 401
    anthropic = {"x-api-key": key}
    assert httpx2.post(f"{server.url}/v1/completions", json=PROMPT, headers=anthropic).status_code == 200
    assert httpx2.get(f"{server.url}/live").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=wrong, max_retries=0).models.list()
    assert openai.OpenAI(base_url=f"{server.url}/v1", api_key=key).models.list().data


async def test_a_key_is_its_tenant(server: RunningServer, store: StoreConfig) -> None:
    keys = {tenant: (await new_key(store, tenant))[1] for tenant in ("red", "blue")}
    wait_until(lambda: complete(server, keys["blue"]).status_code == 200)
    body = PROMPT | {"prompt_cache_key": "talk"}
    httpx2.post(f"{server.url}/v1/completions", json=body, headers=bearer(keys["red"]))
    ids = {
        tenant: [row["id"] for row in httpx2.get(f"{server.url}/v1/sessions", headers=bearer(key)).json()["data"]]
        for tenant, key in keys.items()
    }
    assert "talk" in ids["red"]
    assert "talk" not in ids["blue"]
    own = httpx2.post(f"{server.url}/v1/completions", json=PROMPT, headers=bearer(keys["red"]) | {"x-tenant-id": "red"})
    assert own.status_code == 200
    other = httpx2.post(
        f"{server.url}/v1/completions", json=PROMPT, headers=bearer(keys["red"]) | {"x-tenant-id": "blue"}
    )
    assert (other.status_code, other.json()["error"]["code"]) == (403, "tenant_mismatch")


async def test_scopes(server: RunningServer, store: StoreConfig) -> None:
    keys = {scope: (await new_key(store, "acme", scope))[1] for scope in Scope}
    wait_until(lambda: complete(server, keys[Scope.INFERENCE]).status_code == 200)
    table = {
        "/v1/models": {Scope.INFERENCE},
        "/metrics": {Scope.METRICS, Scope.ADMIN},
        "/admin/v1/keys": {Scope.ADMIN},
    }
    wait_until(lambda: httpx2.get(f"{server.url}/admin/v1/keys", headers=bearer(keys[Scope.ADMIN])).status_code == 200)
    for path, allowed in table.items():
        for scope, key in keys.items():
            response = httpx2.get(f"{server.url}{path}", headers=bearer(key))
            assert response.status_code == (200 if scope in allowed else 403), (path, scope)
            if scope not in allowed:
                assert response.json()["error"]["code"] == "insufficient_permissions"
    for scope, key in keys.items():  # this server loads no adapters: who may ask hears that
        response = httpx2.post(f"{server.url}/v1/load_lora_adapter", headers=bearer(key), json={})
        assert response.status_code == (404 if scope is Scope.ADMIN else 403), scope
        response = httpx2.delete(f"{server.url}/v1/models/others-adapter", headers=bearer(key))
        assert response.status_code == (404 if scope is Scope.ADMIN else 403), scope
    assert httpx2.get(f"{server.url}/admin/v1/keys").status_code == 401
    assert httpx2.get(f"{server.url}/v1/models", headers=bearer(ADMIN_KEY)).status_code == 403


async def test_revoked_by_another_process_in_mid_stream(slow: tuple[RunningServer, StoreConfig]) -> None:
    server, store = slow
    key_id, key = await new_key(store)
    wait_until(lambda: complete(server, key, max_tokens=1).status_code == 200)
    body = PROMPT | {"stream": True, "max_tokens": 2000, "ignore_eos": True}
    lines: list[str] = []
    async with (
        httpx2.AsyncClient(timeout=30) as client,
        client.stream("POST", f"{server.url}/v1/completions", json=body, headers=bearer(key)) as response,
    ):
        assert response.status_code == 200
        collected = asyncio.create_task(
            client.post(f"{server.url}/v1/completions", json=body | {"stream": False}, headers=bearer(key))
        )
        async for line in response.aiter_lines():
            lines += [line] if line else []
            if len(lines) == 3:
                async with tables(store) as access:
                    await access.revoke_key(key_id)
                revoked_s = time.monotonic()
        assert time.monotonic() - revoked_s < 10  # of 100 s
        error = json.loads(lines[-1].removeprefix("data: "))["error"]
        assert error["code"] == "invalid_api_key"
        assert "data: [DONE]" not in lines
        assert (await collected).status_code == 401
    assert complete(server, key).status_code == 401


async def test_an_expired_key_ends_too(slow: tuple[RunningServer, StoreConfig]) -> None:
    server, _ = slow
    made = admin(server, "POST", "/keys", json={"tenant_id": "brief", "expires_in_s": 1.0}).json()
    answer = complete(server, made["key"], max_tokens=2000, ignore_eos=True)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_the_admin_api(server: RunningServer) -> None:
    made = admin(server, "POST", "/keys", json={"tenant_id": "shop", "name": "till", "scopes": ["inference"]}).json()
    assert (made["tenant_id"], made["name"], made["status"], made["expires"]) == ("shop", "till", "active", None)
    assert complete(server, made["key"]).status_code == 200
    listed = {row["id"]: row for row in admin(server, "GET", "/keys").json()["data"]}
    assert "key" not in listed[made["id"]]
    new = admin(server, "POST", f"/keys/{made['id']}/rotate", json={}).json()
    assert complete(server, made["key"]).status_code == 401
    assert complete(server, new["key"]).status_code == 200
    assert admin(server, "DELETE", f"/keys/{new['id']}").json()["status"] == "revoked"
    assert complete(server, new["key"]).status_code == 401
    assert admin(server, "DELETE", "/keys/none").status_code == 404
    assert admin(server, "POST", "/keys/none/rotate", json={}).status_code == 404
    assert admin(server, "GET", "/tenants/none").status_code == 404
    for path, body in (("/keys", {"scopes": ["root"]}), ("/keys", {"tenant_id": "a b"}), ("/keys", {"extra": 1})):
        assert admin(server, "POST", path, json=body).status_code == 400
    for changes in ({"weight": 0}, {"tokens_per_minute": -1}, {"cache_group": ""}, {"max_num_running": 1.5}):
        assert admin(server, "PATCH", "/tenants/shop", json=changes).status_code == 400


def test_a_disabled_tenant(server: RunningServer) -> None:
    made = admin(server, "POST", "/keys", json={"tenant_id": "closed"}).json()
    assert complete(server, made["key"]).status_code == 200
    admin(server, "PATCH", "/tenants/closed", json={"is_disabled": True})
    answer = complete(server, made["key"])
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "tenant_disabled")
    admin(server, "PATCH", "/tenants/closed", json={"is_disabled": False})
    assert complete(server, made["key"]).status_code == 200


def test_tenants_share_prefixes_only_where_they_agree_to(server: RunningServer) -> None:
    keys = {name: admin(server, "POST", "/keys", json={"tenant_id": name}).json()["key"] for name in "pqrs"}
    for name in "rs":
        admin(server, "PATCH", f"/tenants/{name}", json={"cache_group": "both"})
    prompt = "a prefix that is long enough to fill several blocks of the cache" * 3

    def num_cached(name: str) -> int:
        usage = complete(server, keys[name], prompt=prompt, max_tokens=1).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert num_cached("p") == 0
    assert num_cached("p") > 100
    assert num_cached("q") == 0
    assert num_cached("r") == 0
    assert num_cached("s") > 100


async def test_a_server_takes_up_the_first_key(tmp_path: Path) -> None:
    config = store_at(tmp_path / "later")
    with key_server(config) as server:
        url = f"{server.url}/v1/completions"
        assert httpx2.post(url, json=PROMPT).status_code == 200
        assert admin(server, "GET", "/keys").json() == {"data": [], "object": "list"}
        assert httpx2.post(url, json=PROMPT).status_code == 200
        key_id, key = await new_key(config)
        wait_until(lambda: httpx2.post(url, json=PROMPT).status_code == 401)
        assert complete(server, key).status_code == 200
        async with tables(config) as access:
            await access.revoke_key(key_id)
        wait_until(lambda: complete(server, key).status_code == 401)
        # The last key is gone, and the door stays shut.
        assert httpx2.post(url, json=PROMPT).status_code == 401


async def test_no_secret_in_the_log(
    server: RunningServer, store: StoreConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import logging

    from pelton.serving import logs

    _, key = await new_key(store)
    wait_until(lambda: complete(server, key).status_code == 200)
    monkeypatch.setattr(logs, "_level", logging.DEBUG)
    complete(server, key, prompt="a private thought")
    complete(server, key + "x", prompt="a private thought")
    admin(server, "POST", "/keys", json={"tenant_id": "logged"})
    written = "".join(capfd.readouterr())
    assert '"event": "request"' in written
    for secret in (key, key.split("_", 2)[2], ADMIN_KEY, "private thought"):
        assert secret not in written
