"""`make gpu-check` without a GPU: it says so; items run with no package that a GPU machine lacks; its verdicts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.gpu import check, warm
from benchmarks.gpu import hand_over as hand_over_module
from benchmarks.gpu.check import (
    ITEMS,
    MISSED_LIMITS,
    NO_DEVICE,
    PEER,
    START_S,
    TOTAL_S,
    UNTIMED,
    conclude,
    finish_warming,
    run_apart,
)
from benchmarks.gpu.engine_items import summary
from benchmarks.gpu.hand_over import hand_over
from benchmarks.gpu.parts import in_parts
from benchmarks.gpu.verdicts import LIMITS, MOST_PRODUCT_ERROR

from pelton.engine.kv.costs import KVCosts
from tests.wait import is_alive, wait_until

ROOT = Path(__file__).resolve().parents[2]
# What is imported of a machine with torch, Triton and transformers: no msgspec, no llguidance, no native kernels.
THERE = ("torch", "torchgen", "functorch", "triton", "numpy", "typing_extensions", "sympy", "mpmath", "networkx")
THERE += ("jinja2", "markupsafe", "fsspec", "filelock")
LENGTHS = ((128, 128), (1000, 1000), (2048, 128))


def run(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`path`: the only packages there are, beside Python's own."""
    places = [*([] if path is None else [path]), ROOT / "src", ROOT]
    environment = {**os.environ, "PYTHONPATH": ":".join(map(str, places))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *([] if path is None else ["-S"]), "-m", "benchmarks.gpu.check", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.torch
@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


def test_a_python_without_torch_is_named() -> None:
    command = [sys.executable, "-S", "-m", "benchmarks.gpu.check"]  # -S: none of the installed packages
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": f"{ROOT}/src:{ROOT}"}, capture_output=True, text=True)
    assert done.returncode == NO_DEVICE
    assert f"no torch and no triton: {sys.executable}" in done.stderr


@pytest.mark.torch
@pytest.mark.parametrize("item", ["kernels", "same text", "throughput fp8", "hand-over"])
def test_items_run_where_nothing_else_is_installed(item: str, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in THERE:
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        found = Path(spec.origin)
        found = found.parent if found.name == "__init__.py" else found
        (packages / found.name).symlink_to(found)
        libraries = found.with_name(f"{name}.libs")
        if libraries.is_dir():
            (packages / libraries.name).symlink_to(libraries)
    out = tmp_path / "result.json"
    done = run("--interpret", "--only", item, "--out", str(out), path=packages)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["items"][item]["rows"]
    if item == "kernels":
        measured = {name for row in report["items"][item]["rows"] for name in row}
        assert measured >= {"rms_norm", "rotary", "embedding", "silu_mul", "copy", "late", "moe", "lora", "sampled"}
        parts = {row.get("part") for row in report["items"][item]["rows"]}
        assert parts >= {f"product, {kind}" for kind in MOST_PRODUCT_ERROR}
    assert report["status"] == 0
    first, second = done.stdout.splitlines()[:2]
    assert f"torch {torch.__version__}" in first
    assert second.startswith("ok")


def test_every_item_is_sure_of_its_time() -> None:
    assert START_S + sum(seconds for seconds, _ in ITEMS.values()) <= TOTAL_S < 480
    assert {limit.item for limit in LIMITS} <= set(ITEMS)


def test_items_that_take_all_they_may_end_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each has what it was sure of, though kernels are still being compiled, and the start was slow."""
    clock, limits = [1000.0], dict[str, float]()

    def take(name: str, limit_s: float, _: Path) -> dict[str, Any]:
        limits[name] = limit_s
        clock[0] += limit_s
        return {"rows": [], "s": limit_s}

    def start() -> dict[str, Any]:
        clock[0] += START_S
        return {}

    def wait(_: object, limit_s: float) -> None:
        clock[0] += limit_s

    monkeypatch.setattr(check, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(check, "BEGUN_S", clock[0])
    monkeypatch.setattr(check, "describe", start)
    monkeypatch.setattr(check, "start_warming", lambda _: [])
    monkeypatch.setattr(check, "finish_warming", wait)
    monkeypatch.setattr(check, "run_apart", take)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["check", "--out", str(tmp_path / "result.json")])
    check.main()
    assert clock[0] - 1000.0 <= TOTAL_S
    assert {name: limit_s for name, limit_s in limits.items() if limit_s < ITEMS[name][0]} == {}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_blocks_are_handed_over_where_computing_them_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where an engine that is asked for speed would not wait for them."""
    monkeypatch.setattr(KVCosts, "recompute_s", lambda *_: 1e-9)
    row = hand_over(tiny=True)[0]
    assert row["blocks"] == 2


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_what_the_process_that_prefills_said_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hand_over_module, "_CHILD", "input(); raise SystemExit('no such device')")
    with pytest.raises(RuntimeError, match="the process that prefills has ended: no such device"):
        hand_over(tiny=True)


def all_well() -> dict[str, Any]:
    rates = [{"input": first, "output": second, "output_tok_s": 1000.0} for first, second in LENGTHS]
    rows: dict[str, list[dict[str, Any]]] = {
        "kernels": [{"part": "norms, float32", "most_error": 1e-5, "rms_norm": 1e-7}, {"sampled": 64}],
        "single stream": [
            {"weights": name, "share": 0.86, "first_token_s": 8.0} for name in ("bfloat16", "fp8", "int4")
        ],
        "prefill 8192": [{"tflop_s": 500.0, "share": 0.66}],
        "attention": [{"name": "decode 256 x 2K", "share": 0.8, "error": 1e-3, "same_bits": True, "most_error": 0.01}],
        "busy": [{"batch": 256, "busy": 0.98}],
        "throughput bf16": [{**row, "output_tok_s": 4500.0} for row in rates],
        PEER: rates,
        "products": [{"kind": "fp8", "shape": "qkv", "num_rows": 1, "error": 4e-2, "same_bits": None}],
    }
    return {name: {"rows": each, "s": 1.0} for name, each in rows.items()}


@pytest.mark.parametrize(
    ("item", "change", "status", "says"),
    [
        ("busy", {}, 0, "10 of 10 limits of speed reached"),
        ("busy", {"busy": 0.96}, MISSED_LIMITS, "fall short   device busy"),
        ("single stream", {"first_token_s": 11.0}, MISSED_LIMITS, "fall short   first token of the 8B"),
        ("prefill 8192", {"share": 0.6}, MISSED_LIMITS, "9 of 10"),
        ("attention", {"share": 0.7}, MISSED_LIMITS, "fall short   decode attention"),
        ("attention", {"share": 0.7, "same_bits": False}, 1, "WRONG        attention, decode 256 x 2K: other bits"),
        ("attention", {"error": float("nan")}, 1, "error nan"),
        ("products", {"error": 0.5}, 1, "RESULTS ARE WRONG"),
        ("kernels", {"rms_norm": 2e-5}, 1, "WRONG        kernels, norms, float32: rms_norm 2.0e-05 from float64"),
        ("throughput bf16", {"output_tok_s": 3900.0}, MISSED_LIMITS, "throughput 128/128"),
    ],
)
def test_wrong_results_and_missed_limits_are_told_apart(
    item: str, change: dict[str, Any], status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    items = all_well()
    items[item]["rows"][0] |= change
    report = {"items": items}
    assert conclude(report) == report["status"] == status
    assert says in capsys.readouterr().out
    assert len(report["verdicts"]) == 10


@pytest.mark.parametrize(("item", "status"), [("kernels", 1), ("busy", 1), (PEER, MISSED_LIMITS)])
def test_an_item_that_breaks_is_a_failure_unless_it_is_the_peer(item: str, status: int) -> None:
    items = all_well()
    items[item] = {"rows": [], "error": "it broke", "s": 1.0}
    report: dict[str, Any] = {"items": items}
    assert conclude(report) == status
    assert conclude({"items": items}, judged=False) == (1 if status == 1 else 0)


def test_a_part_that_raises_costs_itself(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield {"weights": "int4", "share": 0.9}
        raise ValueError("no such kernel")

    good = [{"weights": name, "share": 0.9, "first_token_s": 8.0} for name in ("bfloat16", "fp8")]
    parts = [("first", lambda: good[:1]), ("second", broken), ("third", lambda: good[1:])]
    rows = list(in_parts(parts))
    assert [row.get("weights", row.get("part")) for row in rows] == ["bfloat16", "int4", "second", "fp8"]
    assert "ValueError: no such kernel" in rows[2]["failed"]
    assert "second: ValueError: no such kernel" in summary(rows)
    items = all_well()
    items["single stream"]["rows"] = rows
    report: dict[str, Any] = {"items": items}
    assert conclude(report) == 1
    assert "no result: single stream (second)" in capsys.readouterr().out
    assert [verdict["verdict"] for verdict in report["verdicts"]] == ["pass"] * 10


def test_a_device_that_is_broken_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[dict[str, Any]]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", broken_device)
        return broken_device()

    def broken_device() -> list[dict[str, Any]]:
        raise RuntimeError("an illegal memory access was encountered")

    rows = list(in_parts([("first", broken), ("second", lambda: [{}])]))
    assert [row["part"] for row in rows] == ["first", "the rest"]
    assert "first left the device unusable" in rows[1]["failed"]


SLEEPER = """
import json, subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Path(sys.argv[sys.argv.index("--out") + 1]).write_text(json.dumps({"rows": [{"child": child.pid}]}))
time.sleep(60)
"""


def test_an_item_that_hangs_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen

    def start_sleeper(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return start([sys.executable, "-c", SLEEPER, *command[3:]], **options)

    monkeypatch.setattr(subprocess, "Popen", start_sleeper)
    found = run_apart("kernels", 3.0, tmp_path)
    assert found["error"] == "took more than 3 s"
    child = found["rows"][0]["child"]
    wait_until(
        lambda: not is_alive(child), "the child goes on"
    )  # a signal is sent in one moment and heard in a later one


def test_what_items_launch_can_be_compiled_before(tmp_path: Path) -> None:
    """A decode of the model of equal text: every kernel of a step goes to Triton's cache, and what launches it, too,
    where there is a driver to link with."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    subprocess.run([compiler, "-shared", "-x", "c", "/dev/null", "-o", tmp_path / "libcuda.so.1"], check=True)
    labels = [label for label, _ in warm.work()]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["TRITON_LIBCUDA_PATH"] = str(tmp_path)
    environment.pop("TRITON_INTERPRET", None)
    share = str(labels.index("same text, 1"))
    command = [sys.executable, "-m", "benchmarks.gpu.warm", share, str(len(labels)), "90"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    compiled = {path.stem for path in tmp_path.rglob("*.cubin")}
    assert {"product_kernel", "attention_kernel", "merge_kernel", "_rms_norm_kernel", "choose_kernel"} <= compiled
    assert len(list(tmp_path.rglob("__triton_launcher*.so"))) >= 5


def test_compiling_ends_before_anything_is_timed() -> None:
    sleepers = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
    processes = list(sleepers)
    finish_warming(processes, 0.05)
    assert all(sleeper.returncode == -signal.SIGKILL for sleeper in sleepers)
    assert not processes
    assert set(UNTIMED) < set(ITEMS)
    assert not set(UNTIMED) & {limit.item for limit in LIMITS}
