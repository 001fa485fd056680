"""The benchmarks with agents, on servers that answer at once and on virtual time; and their plots."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

from tests.benchmarks.test_peers import ROOT, Bench

SVG = "{http://www.w3.org/2000/svg}"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def texts(path: Path) -> list[str]:
    return [element.text or "" for element in xml.etree.ElementTree.parse(path).iter(f"{SVG}text")]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def peers(bench: Bench, names: str) -> tuple[str, ...]:
    serve, tokenizer = bench.output.parent / "serve.sh", bench.output.parent / "model"
    return ("--output", str(bench.output), "--peers", names, "--serve", str(serve), "--tokenizer", str(tokenizer))


def test_agents_beside_peers(bench: Bench) -> None:
    command = f"{sys.executable} {Path(__file__).parent / 'fake_peer.py'} c {{port}}"
    arguments = (*peers(bench, "a,broken"), "--command", f"c={command}", "--rounds", "2", "--short")
    table = run("agent_jobs.py", *arguments)
    document = bench.document()
    assert sorted((run["round"], run["engine"]) for run in document["runs"]) == [(0, "a"), (0, "c"), (1, "a"), (1, "c")]
    for done in document["runs"]:
        assert [load["report"]["num_errors"] for load in done["loads"].values()] == [0, 0]
        assert done["loads"]["2"]["completions_s"]
    assert "**4 agents at a time**" in table
    assert "broken, round 1: the server ended with 1" in table
    assert "mean job completion time, by agents at a time" in texts(bench.output.with_suffix(".svg"))
    assert run("agent_jobs.py", *arguments).splitlines()[:8] == table.splitlines()[:8]
    assert len(bench.document()["runs"]) == 4


def test_noisy_neighbour_on_a_server(bench: Bench) -> None:
    table = run("noisy_neighbour.py", *peers(bench, "a"), "--short")
    (done,) = bench.document()["runs"]
    assert (done["alone"]["num_turns"], done["beside"]["num_errors"]) == (8, 0)
    assert len(done["beside"]["turns"]) == 8
    assert table.splitlines()[2].startswith("| a | 1 | ")


def test_noisy_neighbour_on_virtual_time(tmp_path: Path) -> None:
    output = tmp_path / "x.json"
    run("noisy_neighbour.py", "--output", str(output), "--simulate", "h100-8b", "--policies", "fcfs,fair")
    fcfs, fair = json.loads(output.read_text())["runs"]
    assert fcfs["beside"]["ttft_p99_s"] > 100 * fcfs["alone"]["ttft_p99_s"]
    assert fair["beside"]["ttft_p99_s"] < fcfs["beside"]["ttft_p99_s"] / 20
    assert {"fcfs", "fair", "B's TTFT p99"} <= set(texts(output.with_suffix(".svg")))


def test_fairness_study(tmp_path: Path) -> None:
    run("fairness.py", "--policies", "fcfs,fair", "--output", str(tmp_path / "x.svg"), "--short")
    studies = {
        (study["study"], study["policy"]): study for study in json.loads((tmp_path / "x.json").read_text())["studies"]
    }
    assert studies["overload", "fair"]["gap"] < studies["overload", "fcfs"]["gap"] / 50
    for weight in (1, 2, 3, 4):
        assert studies["weights", "fair"]["shares"][f"weight {weight}"] == pytest.approx(weight / 10, rel=0.03)
    assert studies["burst", "fair"]["shares"]["steady"] == pytest.approx(0.5, abs=0.02)
    assert studies["burst", "fcfs"]["shares"]["steady"] < 0.1
    assert "overload, fair" in texts(tmp_path / "x.svg")
