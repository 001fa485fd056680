"""benchmarks/bfcl.py: what counts as a right call, and the schemas it makes of BFCL's."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bfcl  # noqa: E402

FUNCTION: dict[str, Any] = {
    "name": "math.area",
    "description": "Area",
    "parameters": {
        "type": "dict",
        "properties": {
            "base": {"type": "float"},
            "unit": {"type": "string", "default": "cm"},
            "type": {"type": "any"},
            "corner": {"type": "tuple", "items": {"type": "integer"}},
        },
        "required": ["base"],
    },
}
EXPECTED = {"math.area": {"base": [10], "unit": ["units", ""], "type": [""], "corner": [[1, 2], ""]}}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "bfcl.whl"
    question = {"id": "p_0", "question": [[{"role": "user", "content": "?"}]], "function": [FUNCTION]}
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("bfcl_eval/data/BFCL_v4_parallel.json", json.dumps(question) + "\n")
        answer = {"id": "p_0", "ground_truth": [EXPECTED, {"math.area": {"base": [5], "unit": [""]}}]}
        file.writestr("bfcl_eval/data/possible_answer/BFCL_v4_parallel.json", json.dumps(answer) + "\n")
    return path


def test_cases_are_read_from_the_archive(archive: Path) -> None:
    (case,) = bfcl.load_cases(archive, "parallel", 0, 5)
    assert case.schema("math.area") == {
        "type": "object",
        "properties": {
            "base": {"type": "number"},
            "unit": {"type": "string"},
            "type": {},
            "corner": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["base"],
    }
    assert bfcl.load_cases(archive, "parallel", 1, 5) == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"base": 10}, None),
        ({"base": 10.0, "unit": "Units ", "corner": [1, 2]}, None),
        ({"base": "10"}, "another value"),
        ({"base": True}, "another value"),
        ({"base": 10, "corner": [2, 1]}, "another value"),
        ({"unit": "units"}, "a required parameter is missing"),
        ({"base": 10, "height": 1}, "an unknown parameter"),
    ],
)
def test_a_call(archive: Path, arguments: Any, problem: str | None) -> None:
    (case,) = bfcl.load_cases(archive, "parallel", 0, 1)
    assert bfcl.check_calls(case, [("math.area", json.dumps(arguments)), ("math.area", '{"base": 5}')]) == problem


def test_several_calls(archive: Path) -> None:
    (case,) = bfcl.load_cases(archive, "parallel", 0, 1)
    first, second = ("math.area", '{"base": 10}'), ("math.area", '{"base": 5}')
    assert bfcl.check_calls(case, [second, first]) is None
    assert bfcl.check_calls(case, [first, first]) == "another value"
    assert bfcl.check_calls(case, [first]) == "1 calls"
    assert bfcl.check_calls(case, []) == "no call"
    assert bfcl.check_calls(case, [first, ("area", '{"base": 5}')]) == "another function"
    assert bfcl.check_calls(case, [first, ("math.area", '{"base"')]) == "arguments are no JSON"


def test_what_required_must_give(archive: Path) -> None:
    (case,) = bfcl.load_cases(archive, "parallel", 0, 1)
    assert bfcl.schema_problem(case, [("math.area", '{"base": 1, "type": null}')], "tool_calls") is None
    assert "is not of type" in str(bfcl.schema_problem(case, [("math.area", '{"base": "1"}')], "tool_calls"))
    assert bfcl.schema_problem(case, [], "stop") == "no call"
    assert bfcl.schema_problem(case, [("area", "{}")], "stop") == "area is no tool"
