"""Ranks that start together: they share a host's memory, and one that is lost on the way is named at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pelton.build import PeltonConfig
from pelton.core.errors import ConfigError
from pelton.engine.config import EngineConfig
from pelton.weights.config import ModelConfig
from pelton.worker.config import WorkerConfig
from pelton.worker.executors import kv_plan
from pelton.worker.executors.build_worker import RankSettings
from pelton.worker.executors.host_resources import num_available_memory_bytes
from pelton.worker.executors.kv_plan import FreeMemory, find_free_memory, plan_on
from pelton.worker.executors.other_rank import OtherRank, build_beside
from pelton.worker.kernels.ops import make_kernels
from pelton.worker.kv_format import KV_FORMATS
from pelton.worker.parallel import RankPlace, wait_for_all
from tests.system.test_tensor_parallel import build, keep_thread_count, model
from tests.wait import wait_until
from tests.worker.test_executor import BLOCK_BYTES, ENGINE, GIB, SPEC

__all__ = ["keep_thread_count", "model"]  # fixtures
pytestmark = pytest.mark.torch


class Together:
    """Stands in for `Ranks`: what the others say is what this one says."""

    rank = 0
    size = 2

    def __init__(self) -> None:
        self.num_meetings = 0

    def least(self, values: Any) -> list[int]:
        self.num_meetings += 1
        return list(values)


def test_ranks_share_what_a_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """They all look at once: between two meetings, the first once all have loaded their weights."""
    ranks, looked_after = Together(), []
    free_bytes = 400 * BLOCK_BYTES

    def look() -> int:
        looked_after.append(ranks.num_meetings)
        return free_bytes

    monkeypatch.setattr(kv_plan, "num_available_memory_bytes", look)
    kernels = make_kernels("reference")
    free = [find_free_memory(kernels, each) for each in (None, ranks)]  # type: ignore[arg-type]
    assert free == [FreeMemory(free_bytes, None), FreeMemory(free_bytes // 2, None, 2)]
    assert (looked_after, ranks.num_meetings) == ([0, 1], 2)
    plans = [plan_on(SPEC, ENGINE, KV_FORMATS["float32"], kernels, each) for each in free]
    assert [plan.num_blocks for plan in plans] == [100, 50]
    free_bytes = 400 * GIB
    config = replace(ENGINE, max_num_seqs=2**18, max_num_batched_tokens=2**18)
    plans = [
        plan_on(SPEC, config, KV_FORMATS["float32"], kernels, find_free_memory(kernels, each))  # type: ignore[arg-type]
        for each in (None, ranks)
    ]
    assert [plan.num_blocks for plan in plans] == [4 * GIB // BLOCK_BYTES, 2 * GIB // BLOCK_BYTES]


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_ranks_that_want_more_than_a_host_has_are_refused(model: Path) -> None:
    """Each for itself would have enough."""
    most_gb = 0.7 * num_available_memory_bytes() / GIB
    with pytest.raises(ConfigError, match=r"KV blocks take .* ask for at most"):
        build(model, tensor_parallel_size=2, num_kv_blocks=None, kv_cache_memory_gb=most_gb)


def end_after_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    wait_until_ready = OtherRank.wait_until_ready

    def wait_and_kill(self: OtherRank) -> None:
        wait_until_ready(self)
        self.kill()

    monkeypatch.setattr(OtherRank, "wait_until_ready", wait_and_kill)


def choose_wrong_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    start = OtherRank.__init__

    def start_other(self: OtherRank, rank: int, settings: bytes) -> None:
        own = msgspec.json.decode(settings)
        own["worker"] |= {"kernel_backend": "native", "dtype": "bfloat16"}
        start(self, rank, msgspec.json.encode(own))

    monkeypatch.setattr(OtherRank, "__init__", start_other)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("lose", "words"),
    [
        (end_after_it_is_ready, r"the process of rank 1 was killed by SIGKILL while it started and said nothing"),
        (
            choose_wrong_kernels,
            r"the process of rank 1 ended with status 1 while it started; its last words:\n"
            r"a rank cannot start: native kernels compute in float32, not bfloat16",
        ),
    ],
)
def test_a_rank_that_is_lost_before_all_have_met_is_named(
    model: Path, lose: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(monkeypatch)
    with pytest.raises(ConfigError, match=words):
        build(model, tensor_parallel_size=2)


def test_a_meeting_can_be_called_off_and_ends(tmp_path: Path) -> None:
    place = RankPlace(0, 2, str(tmp_path / "here" / "store"))
    with pytest.raises(ConnectionError, match="rank 0 was called off"):
        wait_for_all(place)
    (tmp_path / "here").mkdir()
    with pytest.raises(ConnectionError, match=r"in vain for ranks \[1\]"):
        wait_for_all(place, timeout_s=0.03)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_for_all, place)
        while not waiting.done():
            shutil.rmtree(tmp_path / "here", ignore_errors=True)
        with pytest.raises(ConnectionError, match="rank 0 was called off"):
            waiting.result(timeout=30)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "rank-1").touch()
    wait_for_all(place)


class Lost:
    """A rank as `build_beside` sees it."""

    def __init__(self, has_ended: bool) -> None:
        self._has_ended = has_ended

    def has_ended(self) -> bool:
        return self._has_ended

    def end(self) -> str:
        return "rank 1 is lost"


@pytest.mark.parametrize(
    ("has_ended", "error", "becomes", "words"),
    [
        (True, RuntimeError("Connection closed by peer"), ConfigError, "rank 1 is lost"),
        (True, ConfigError("too few blocks"), ConfigError, "too few blocks"),  # for both
        (False, ConnectionError("rank 0 did not meet the other"), ConfigError, "did not meet"),
        (False, RuntimeError("a defect"), RuntimeError, "a defect"),
    ],
    ids=str,
)
def test_what_ends_a_start_is_told(has_ended: bool, error: Exception, becomes: type[Exception], words: str) -> None:
    def build_own() -> None:
        raise error

    with pytest.raises(becomes, match=words):
        build_beside([Lost(has_ended)], build_own)  # type: ignore[list-item]
    assert build_beside([Lost(False)], lambda: 7) == 7  # type: ignore[list-item]


START_AND_LEAVE = """
import os, sys
from pelton.worker.executors.other_rank import OtherRank
rank = OtherRank(1, sys.stdin.buffer.read())
rank.wait_until_ready()
print(rank._process.pid, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_rank_does_not_wait_for_others_when_the_first_is_gone(model: Path, tmp_path: Path) -> None:
    place = RankPlace(1, 2, str(tmp_path / "store"))
    worker = WorkerConfig(kernel_backend="reference", tensor_parallel_size=2, threads=1)
    config = PeltonConfig.of({"model": str(model)})
    settings = RankSettings(ModelConfig(model=config.model.model), worker, EngineConfig(num_kv_blocks=20), place)
    done = subprocess.run(
        [sys.executable, "-c", START_AND_LEAVE], input=msgspec.json.encode(settings), capture_output=True, check=True
    )
    folder = Path("/proc") / done.stdout.decode().strip()
    wait_until(lambda: not os.path.exists(folder), "a rank outlives the first one")
