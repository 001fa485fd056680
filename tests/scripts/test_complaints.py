"""The tests that docs/complaints.md names exist, and every complaint has one or says why not."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "complaints.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| complaint")]


def named(row: str) -> list[tuple[str, str]]:
    """(file, test); a name without a file belongs to the file before it."""
    found, file = [], ""
    for path, name in re.findall(r"`(tests/[\w/]+\.py)?::(\w+)`", row):
        file = path or file
        found.append((file, name))
    return found


def test_every_named_test_exists() -> None:
    assert len(ROWS) == 18
    for row in ROWS:
        tests = named(row)
        assert tests or "Not built" in row, row
        for file, name in tests:
            tree = ast.parse((ROOT / file).read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
