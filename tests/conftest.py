from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module", autouse=True)
def _free_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """Gigabytes hang in cycles of a few objects, which the collector does not come to by itself."""
    yield
    if request.node.get_closest_marker("model") is not None:
        gc.collect()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of two processes (`make test`) one starts with the real model's tests, the other at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("model") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.two_ended import TwoEndedScheduling

    config.option.loadscopereorder = False
    return TwoEndedScheduling(config, log)
