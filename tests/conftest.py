from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import Postgres, running_postgres

# As the engine process does (cli/engine_process.py), before anything loads torch: idle OpenMP threads must
# not take the cores from those of the next test.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Triton decides when a kernel is decorated, so before anything imports it. Without a GPU kernels are interpreted.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The real default model: PELTON_TEST_MODEL, or pulled once into the catalog's cache."""
    given = os.environ.get("PELTON_TEST_MODEL")
    if given:
        return Path(given)
    from pelton.weights.catalog import resolve_model
    from pelton.weights.config import ModelConfig

    return resolve_model(ModelConfig())
