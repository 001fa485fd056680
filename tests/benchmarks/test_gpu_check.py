"""`make gpu-check` without a GPU: it says so, and items run under the interpreter, without packages that a GPU machine lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN_WITHOUT_MSGSPEC = """
import runpy, sys
sys.modules["msgspec"] = None  # as where it is not installed
sys.argv[0] = "check"
runpy.run_module("benchmarks.gpu.check", run_name="__main__")
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.torch
@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run("-m", "benchmarks.gpu.check")
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


@pytest.mark.torch
@pytest.mark.parametrize("item", ["kernels", "same text"])
def test_items_run_under_the_interpreter(item: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = run("-c", RUN_WITHOUT_MSGSPEC, "--interpret", "--only", item, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(out.read_text())["items"][item]["rows"]
    assert "ok" in done.stdout
