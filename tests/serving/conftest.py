"""Servers shared by the tests of this room."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import openai
import pytest

from pelton.serving.logs import configure_logs
from tests.serving.make import HERMES_TEMPLATE, RunningServer, running_server


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    configure_logs("critical")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(data_dir=tmp_path_factory.mktemp("data")) as server:
        yield server


@pytest.fixture(scope="session")
def slow_server() -> Iterator[RunningServer]:
    """A step takes 20 ms: time to look at a request while it runs."""
    with running_server(delay_s=0.02) as server:
        yield server


@pytest.fixture(scope="session")
def tool_server() -> Iterator[RunningServer]:
    """Its template knows tools and reasoning; tests say what the model says."""
    with running_server(chat_template=HERMES_TEMPLATE) as server:
        yield server


@pytest.fixture(scope="session")
def openai_client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def http(server: RunningServer) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=30) as client:
        yield client
