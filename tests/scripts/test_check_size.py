import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "scripts" / "check_size.py"


def check(root: Path, name: str, source: str) -> tuple[int, str]:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    done = subprocess.run([sys.executable, SCRIPT, root], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def function(num_lines: int, name: str = "f", docstring: str = "", arguments: str = "") -> str:
    body = ["    x = 1"] * (num_lines - 1)
    return "\n".join([f"def {name}({arguments}):", *([f'    """{docstring}"""'] if docstring else []), *body, ""])


def method(num_lines: int) -> str:
    lines = function(num_lines, "schedule", arguments="self").splitlines()
    return "class Scheduler:\n" + "".join(f"    {line}\n" for line in lines)


EIGHT = "a, b, c, d, e, *, f, g, h"

WITHIN = [
    ("src/pelton/a.py", "x = 1\n" * 400),
    ("src/pelton/worker/model_runner.py", "x = 1\n" * 500),
    ("src/pelton/a.py", function(60)),
    ("src/pelton/a.py", function(60, docstring="Ten\n" * 10)),
    ("src/pelton/a.py", function(2, arguments=EIGHT)),
    ("src/pelton/a.py", "class A:\n    def f(self, a, b, c, d, e, g, h, i): ...\n"),
    ("src/pelton/engine/scheduler.py", method(80)),
]
OVER = [
    ("src/pelton/a.py", "x = 1\n" * 401, "401"),
    ("src/pelton/worker/model_runner.py", "x = 1\n" * 501, "501"),
    ("src/pelton/a.py", function(61), "src/pelton/a.py:f"),
    ("src/pelton/a.py", "async " + function(61), "src/pelton/a.py:f"),
    ("src/pelton/a.py", f"if x:\n    def f({EIGHT}, i): ...\n", "src/pelton/a.py:f"),
    ("src/pelton/a.py", f"def f():\n    def g({EIGHT}, i): ...\n", "src/pelton/a.py:f.g"),
    ("src/pelton/engine/scheduler.py", method(81), "src/pelton/engine/scheduler.py:Scheduler.schedule"),
    ("src/pelton/engine/other.py", method(61), "src/pelton/engine/other.py:Scheduler.schedule"),
    ("scripts/a.py", "x = 1\n" * 401, "scripts/a.py"),
]


@pytest.mark.parametrize(("name", "source"), WITHIN)
def test_within_budget(tmp_path: Path, name: str, source: str) -> None:
    (tmp_path / "src").mkdir()
    code, out = check(tmp_path, name, source)
    assert code == 0, out
    assert "0 over budget" in out


@pytest.mark.parametrize(("name", "source", "shown"), OVER)
def test_over_budget(tmp_path: Path, name: str, source: str, shown: str) -> None:
    code, out = check(tmp_path, name, source)
    assert code == 1
    (row,) = (line for line in out.splitlines() if line.endswith("OVER"))
    assert shown in row
