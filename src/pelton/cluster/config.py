"""Settings of what several engines do together."""

from __future__ import annotations

from dataclasses import dataclass

from pelton.core.config import setting
from pelton.core.errors import ConfigError

CONNECTOR_NAMES = ("shared_memory", "cuda_ipc", "nixl")


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferConfig:
    kv_connector: str = setting(
        "shared_memory",
        "how KV blocks go from one engine to another; shared_memory and cuda_ipc: on one host",
        choices=CONNECTOR_NAMES,
    )
    kv_listen: str | None = setting(
        None, "address where other engines ask for this one's KV blocks: unix:/path, or tcp:host:port with nixl"
    )
    kv_peers: tuple[str, ...] = setting(
        (), "addresses of engines that are asked for KV blocks before a prompt is computed", alias="--kv-peer"
    )
    kv_transfer_gb: float = setting(0.25, "memory for KV blocks on their way, in GiB, in each direction")

    def __post_init__(self) -> None:
        for name, address in [("kv_listen", self.kv_listen), *(("kv_peers", peer) for peer in self.kv_peers)]:
            if address is not None:
                self._check_address(name, address)
        if self.kv_listen in self.kv_peers:
            raise ConfigError(f"kv_peers: {self.kv_listen} is this engine's own address, kv_listen")
        if not self.kv_transfer_gb > 0:
            raise ConfigError(f"kv_transfer_gb is {self.kv_transfer_gb}; it must be positive")

    def _check_address(self, name: str, address: str) -> None:
        kind, _, rest = address.partition(":")
        if kind == "unix" and rest.startswith("/"):
            return
        host, _, port = rest.rpartition(":")
        if kind != "tcp" or not host or not port.isdecimal() or int(port) > 65_535:
            raise ConfigError(f"{name} is {address}; it must be unix:/path or tcp:host:port")
        if self.kv_connector != "nixl":
            raise ConfigError(
                f"{name} is {address}, but {self.kv_connector} works on one host: use unix:/path, or nixl"
            )

    @property
    def is_on(self) -> bool:
        return self.kv_listen is not None or bool(self.kv_peers)
