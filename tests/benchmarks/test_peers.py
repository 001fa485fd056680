"""benchmarks/peers.py with servers that answer at once: rounds, failures, going on, the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.weights.make_tokenizers import write_folder

ROOT = Path(__file__).parent.parent.parent


class Bench:
    def __init__(self, folder: Path) -> None:
        self.output = folder / "result.json"
        self._serve = folder / "serve.sh"
        self._serve.write_text(f'exec {sys.executable} {Path(__file__).parent / "fake_peer.py"} "$1" "$2"\n')
        self._tokenizer = write_folder(folder / "model")
        (self._tokenizer / "config.json").write_text('{"model_type": "llama"}')
        (self._tokenizer / "model.safetensors").write_bytes(b"")

    def run(self, *arguments: str) -> str:
        command = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), "--output", str(self.output), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def measure(self, peers: str, workloads: str, rounds: int) -> str:
        which = ("--peers", peers, "--serve", str(self._serve), "--workloads", workloads, "--rounds", str(rounds))
        return self.run(*which, "--tokenizer", str(self._tokenizer))

    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.output.read_text())
        return document


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_alternates_goes_on_and_survives_a_broken_peer(bench: Bench) -> None:
    bench.measure("llama-a,broken,b", "W1,W3", 2)
    first = bench.document()
    order = [(run["round"], run["engine"], run["workload"]) for run in first["runs"]]
    assert [(number, engine) for number, engine, workload in order if workload == "W1"] == [
        (0, "llama-a"),
        (0, "b"),
        (1, "b"),
        (1, "llama-a"),
    ]
    assert len(order) == 8
    # llama.cpp starts once more, with other slots, for 64 at once.
    starts = [start["engine"] for start in first["starts"]]
    assert (starts.count("llama-a"), starts.count("b")) == (4, 2)
    assert [failure["engine"] for failure in first["failures"]] == ["broken", "broken"]
    assert "cannot load the model" in first["failures"][0]["error"]
    for run in first["runs"]:
        assert run["report"]["num_errors"] == 0
        assert run["peak_rss_mb"] >= run["pss_mb"] > 1

    table = bench.measure("llama-a,b", "W1,W3,W5", 2)
    second = bench.document()
    assert second["runs"][:8] == first["runs"]
    assert [run["workload"] for run in second["runs"][8:]] == ["W5"] * 4
    assert "**W5**" in table
    assert table == bench.run("--table")
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| b | 2 | ")]
    assert len(rows) == 3
    head = next(line for line in table.splitlines() if line.startswith("| engine | rounds | "))
    assert [len(row) for row in rows] == [len(head.split(" | "))] * 3
    assert "broken, round 1: the server ended with 1: cannot load the model" in table


def test_rounds_of_other_prompts_do_not_mix(bench: Bench) -> None:
    bench.measure("a", "W1", 1)
    with pytest.raises(AssertionError, match="made with seed 0, not 7"):
        bench.run("--peers", "a", "--serve", "x", "--tokenizer", "x", "--seed", "7")
