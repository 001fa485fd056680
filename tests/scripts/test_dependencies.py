"""Pelton fits beside other packages: no exact version of anything is asked for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# `reference` is a way to compare results, not to serve; without a version, torch brings gigabytes of CUDA.
SERVED = PROJECT["dependencies"] + EXTRAS["gpu"] + EXTRAS["bench"]


@pytest.mark.parametrize("requirement", SERVED)
def test_versions_have_a_lower_bound_and_at_most_a_next_major_above(requirement: str) -> None:
    versions = re.sub(r"^[\w.-]+(\[[\w,]+\])?", "", requirement.partition(";")[0]).strip()
    lower, _, upper = versions.partition(",")
    assert re.fullmatch(r">=\d+(\.\d+)*", lower), requirement
    if upper:
        major = int(re.findall(r"\d+", lower)[0])
        assert upper.strip() == f"<{major + 1}", requirement
