"""KV connectors: blocks that go from one engine to another. One file each, and a row here."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from pelton.cluster.config import TransferConfig
from pelton.cluster.transfer.connector import PeerConnector, size_of
from pelton.core.errors import ConfigError
from pelton.core.events import EngineInfo

# Name -> module and class of its `Mover`, made of (size, `EngineInfo.device`): imported when it is chosen.
MOVERS = {
    "shared_memory": ("shared_memory", "SharedMemoryMover"),
    "cuda_ipc": ("cuda_ipc", "CudaIpcMover"),
    "nixl": ("nixl", "NixlMover"),
}


def open_connector(config: TransferConfig, info: EngineInfo) -> PeerConnector:
    """Raises `ConfigError` where the connector cannot work here, or its memory or address cannot be had."""
    if sys.platform != "linux":
        raise ConfigError(f"kv_listen and kv_peers work on Linux only, not on {sys.platform}: leave them out")
    module, name = MOVERS[config.kv_connector]
    make_mover: Any = getattr(import_module(f"{__name__}.{module}"), name)
    mover = make_mover(size_of(config, info), info.device)
    try:
        return PeerConnector(config, info, mover)
    except BaseException:
        mover.close()
        raise
