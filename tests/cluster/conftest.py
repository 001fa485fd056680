"""Connectors that ask at, or listen at, `tmp_path / "a"`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pelton.cluster.transfer.connector import PeerConnector
from tests.cluster.make import make_connector


@pytest.fixture
def asking(tmp_path: Path) -> Iterator[Callable[..., PeerConnector]]:
    """Makes connectors that ask at `tmp_path / "a"`."""
    made = []

    def make(**settings: Any) -> PeerConnector:
        made.append(make_connector(**({"kv_peers": (f"unix:{tmp_path / 'a'}",)} | settings)))
        return made[-1]

    yield make
    for connector in made:
        connector.close()


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[PeerConnector]:
    connector = make_connector(kv_listen=f"unix:{tmp_path / 'a'}")
    yield connector
    connector.close()
