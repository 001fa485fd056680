"""Usage is exact to the token: against the engine's counters, across cancellations, failures and `kill -9`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from pelton.core.errors import PeltonError
from pelton.serving.tenants.journal import Journal, journals, read_journal, try_claim
from pelton.store.config import StoreConfig
from pelton.store.records import Tokens
from tests.serving.keys import admin, bearer, complete, key_server, store_at
from tests.serving.make import RunningServer
from tests.serving.mixed_load import Result, run_with_kills
from tests.wait import wait_until

NUM_REQUESTS = int(os.environ.get("PELTON_TEST_NUM_REQUESTS", "450"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with key_server(store_at(tmp_path_factory.mktemp("store")), delay_s=0.005) as server:
        yield server


@pytest.mark.model
async def test_exact_over_two_kills_of_a_real_server(tmp_path: Path, default_model_path: Path) -> None:
    config = StoreConfig(data_dir=str(tmp_path))
    result = await run_with_kills(config, 90, 2, model=str(default_model_path))
    check_exact(result, tmp_path)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_exact_over_two_kills(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("postgres").new_database() if kind == "postgresql" else None
    config = StoreConfig(data_dir=str(tmp_path), database_url=url)
    result = await run_with_kills(config, NUM_REQUESTS, 2)
    check_exact(result, tmp_path)
    assert len(result.seen.kinds) == 7
    assert all(count > NUM_REQUESTS // 12 for count in result.seen.num_done.values())


def check_exact(result: Result, data_dir: Path) -> None:
    usage, seen = result.usage, result.seen
    # Every token that an engine said it had worked on is some tenant's, and no other.
    assert result.engine_totals == (
        sum(used.num_prompt_tokens for used in usage.values()),
        sum(used.num_output_tokens for used in usage.values()),
    )
    assert set(usage) == {"red", "blue"}
    for tenant, used in usage.items():
        # Whatever a client has was counted, though the server was killed right after.
        assert used.num_total >= seen.told[tenant] + seen.delivered[tenant]
        assert used.num_requests >= seen.num_done[tenant] > 0
    assert not list(journals(data_dir / "usage"))


def test_the_counters_of_a_running_engine(server: RunningServer) -> None:
    """Failed and cancelled requests too; `n` and several prompts share or do not share a prompt as the engine does."""
    key = admin(server, "POST", "/keys", json={"tenant_id": "one"}).json()["key"]
    before = server.client.stats
    answers = [complete(server, key, max_tokens=7).json(), complete(server, key, n=3).json()]
    answers.append(complete(server, key, prompt=["abc", "defgh"]).json())
    assert complete(server, key, timeout_s=0.05, max_tokens=1500, ignore_eos=True).status_code == 408
    with (
        httpx2.Client(timeout=30) as client,
        client.stream(
            "POST",
            f"{server.url}/v1/completions",
            json={"prompt": "abc", "max_tokens": 1500, "ignore_eos": True, "stream": True},
            headers=bearer(key),
        ) as response,
    ):
        lines = response.iter_lines()
        for _ in range(6):
            next(lines)
    wait_until(lambda: server.client.stats.num_running == 0)
    time.sleep(0.1)  # a step in flight would take the failure
    server.executor.fail_next = PeltonError("told to")
    assert complete(server, key).status_code == 500
    wait_until(lambda: server.client.num_requests == 0)
    wait_until(lambda: server.client.stats.num_running == 0)
    report = admin(server, "GET", "/usage?group_by=tenant").json()
    (row,) = [row for row in report["data"] if row["tenant_id"] == "one"]
    after = server.client.stats
    assert row["num_prompt_tokens"] == after.num_prompt_tokens_total - before.num_prompt_tokens_total
    assert row["num_output_tokens"] == after.num_output_tokens_total - before.num_output_tokens_total
    told = sum(answer["usage"]["total_tokens"] for answer in answers)
    assert row["num_prompt_tokens"] + row["num_output_tokens"] > told + 10 + 3 + 3
    assert row["num_requests"] == 6
    metrics = httpx2.get(f"{server.url}/metrics", headers=bearer("the-admin-key")).text
    shown = {
        name: float(re.search(rf"^vllm:{name}_tokens_total{{.*}} (.*)$", metrics, re.MULTILINE)[1])  # type: ignore[index]
        for name in ("prompt", "generation")
    }
    assert report["engine"] == {
        "num_prompt_tokens": shown["prompt"],
        "num_output_tokens": shown["generation"],
    }


def test_a_journal_that_was_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(3600, "run", (10, 1), [("acme", "k", 1, 10, 0, 1)])
    journal.append(3600, "run", (10, 2), [("acme", "k", 0, 0, 0, 1)])
    whole = journal.path.read_bytes()
    assert read_journal(journal.path).usage == {(3600, "acme", "k"): Tokens(1, 10, 0, 2)}
    for length in range(len(whole)):
        journal.path.write_bytes(whole[:length])
        content = read_journal(journal.path)
        num_lines = whole[:length].count(b"\n")
        assert sum(used.num_output_tokens for used in content.usage.values()) == num_lines
        assert content.engine_totals == ({"run": (10, num_lines)} if num_lines else {})
    journal.path.write_bytes(whole[:5] + b"x" + whole[6:])
    assert not read_journal(journal.path).usage
    with try_claim(journal.path) as is_ours:
        assert not is_ours  # its process lives
    journal.close()
    with try_claim(journal.path) as is_ours, try_claim(journal.path) as is_another_s:
        assert (is_ours, is_another_s) == (True, False)
        journal.path.unlink()
    with try_claim(journal.path) as is_ours:
        assert not is_ours


def test_a_full_disk_loses_nothing(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    key = admin(server, "POST", "/keys", json={"tenant_id": "disk"}).json()["key"]

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", refuse)
        first = complete(server, key).json()["usage"]["total_tokens"]
    second = complete(server, key).json()["usage"]["total_tokens"]
    report = admin(server, "GET", "/usage?group_by=tenant&tenant_id=disk").json()["data"]
    assert report[0]["num_prompt_tokens"] + report[0]["num_output_tokens"] == first + second
