import json
from pathlib import Path
from typing import Any

import pytest

from pelton.bench.record import RequestRecord
from pelton.core.errors import ConfigError
from pelton.simulate.cost import COSTS
from pelton.simulate.report import make_replay_report
from pelton.simulate.server import SimulatedServer
from pelton.simulate.trace import ReplayPlan, read_trace, replay
from tests.simulate.make import run

LINES: list[dict[str, Any]] = [
    {"timestamp": 0, "input_length": 1500, "output_length": 10, "hash_ids": [0, 1, 2]},
    {"timestamp": 60_000, "input_length": 1024, "output_length": 5, "hash_ids": [0, 9]},
    {"timestamp": 61_000, "input_length": 2600, "output_length": 10, "hash_ids": [0, 1, 5, 6, 7, 8]},
    {"timestamp": 300_000, "input_length": 700, "output_length": 0, "hash_ids": [20, 21]},
]


def write(folder: Path, lines: list[dict[str, Any]] = LINES) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_sessions_are_prompts_that_go_on(tmp_path: Path) -> None:
    requests = read_trace(write(tmp_path))
    assert [request.session for request in requests] == [0, 1, 0, 2]
    assert [request.num_output_tokens for request in requests] == [10, 5, 10, 1]
    assert len(read_trace(write(tmp_path), duration_s=61)) == 3


def test_the_prefix_cache_finds_what_the_trace_shares(tmp_path: Path) -> None:
    async def main(server: SimulatedServer) -> list[tuple[str, RequestRecord]]:
        return await replay(server, read_trace(write(tmp_path)), ReplayPlan())

    records, now_s, server = run(main, COSTS["h100-8b"])
    assert [record.num_prompt_tokens for _, record in records] == [1500, 1024, 2600, 700]
    assert [record.num_cached_tokens for _, record in records] == [0, 512, 1024, 0]
    assert 300 < now_s < 301
    report = make_replay_report(server, [record for _, record in records], now_s, 1.0)
    assert (report.num_requests, report.num_errors, report.num_prompt_tokens) == (4, 0, 5824)
    assert report.cached_share == pytest.approx(1536 / 5824, abs=1e-4)
    assert 0 < report.busy_share < 0.01


def test_speed_and_tenants(tmp_path: Path) -> None:
    lines = [{**LINES[0], "timestamp": 1000 * n, "hash_ids": [3 * n, 3 * n + 1, 3 * n + 2]} for n in range(40)]

    async def main(server: SimulatedServer) -> list[tuple[str, RequestRecord]]:
        return await replay(server, read_trace(write(tmp_path, lines)), ReplayPlan(speed=10, num_tenants=2, seed=3))

    records, now_s, _ = run(main, COSTS["h100-8b"])
    assert {tenant for tenant, _ in records} == {"tenant-0", "tenant-1"}
    assert 3.9 < now_s < 10


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"timestamp": 0}, "not a Mooncake trace"),
        ({**LINES[0], "hash_ids": [1]}, "do not cover"),
        ({**LINES[0], "input_length": 0}, "do not cover"),
    ],
)
def test_what_is_no_trace_is_told(tmp_path: Path, line: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read_trace(write(tmp_path, [line]))


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none.jsonl")
