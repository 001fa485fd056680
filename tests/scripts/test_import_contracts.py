"""Every contract of pyproject.toml breaks when the house is entered by the window."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

# A line for each contract, by its id: module, what it must not import.
VIOLATIONS = {
    "floors": ("core/request.py", "import pelton.engine.config"),
    "core": ("core/batch.py", "import numpy"),
    "engine-worker": ("engine/loop.py", "import pelton.worker.config"),
    "weights": ("weights/specs.py", "import pelton.engine.config"),
    "engine": ("engine/loop.py", "import fastapi"),
    "bench": ("bench/run.py", "import pelton.serving.config"),
    "simulate": ("simulate/server.py", "import pelton.weights.config"),
    "no-torch": ("serving/app.py", "import torch"),
    "database": ("engine/config.py", "import sqlalchemy"),
    "worker-no-torch": ("worker/kv_storage.py", "import torch"),
    "cluster": ("cluster/config.py", "import pelton.weights.config"),
    "cluster-no-torch": ("cluster/transfer/wire.py", "import torch"),
    "cli-no-torch": ("cli/chat.py", "import torch"),
    "no-web": ("worker/config.py", "import fastapi"),
    "parts": ("engine/scheduler.py", "import pelton.engine.policies.fcfs"),
}

# Leave to read the engine's settings is given to modules by name, not to their neighbours.
NEIGHBOUR = ("worker/executors/in_process.py", "import pelton.engine.config")

# The editable install's finder would lead to the real package, ahead of every path.
LINT_IMPORTS = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable")]
from importlinter.cli import lint_imports_command
lint_imports_command()
"""


def test_every_contract_can_break(tmp_path: Path) -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert {contract["id"] for contract in contracts} == set(VIOLATIONS)
    package = tmp_path / "src" / "pelton"
    shutil.copytree(ROOT / "src" / "pelton", package, ignore=shutil.ignore_patterns("__pycache__"))
    for file, line in (*VIOLATIONS.values(), NEIGHBOUR):
        path = package / file
        path.write_text(f"{path.read_text()}\n{line}\n")
    (package / "shed").mkdir()  # a room that stands on no floor
    (package / "shed" / "__init__.py").touch()
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", LINT_IMPORTS, "--no-logo", "--no-cache"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    for contract in contracts:
        assert f"{contract['name']} BROKEN" in done.stdout
    assert "shed" in done.stdout
    assert "pelton.worker.executors.in_process -> pelton.engine.config" in done.stdout
