"""Settings of the HTTP server."""

from __future__ import annotations

from dataclasses import dataclass

from pelton.core.config import setting
from pelton.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port to listen on; 0: any free one")
    api_key: str | None = setting(None, "key that clients must send as a bearer token")
    served_model_name: tuple[str, ...] = setting((), "names clients may use; default: the model's own")
    chat_template: str | None = setting(None, "file with a Jinja chat template, instead of the model's own")
    request_timeout_s: float = setting(600.0, "deadline of a request that brings none; 0: none")
    drain_timeout_s: float = setting(30.0, "on SIGTERM, how long running requests may take to finish")
    max_body_bytes: int = setting(32 * 2**20, "largest request body")
    cors_origins: tuple[str, ...] = setting((), "origins that browsers may call from; default: none")
    allow_runtime_lora_updating: bool = setting(
        False, "let clients load and unload LoRA adapters from this machine's files: /v1/load_lora_adapter"
    )
    log_level: str = setting("info", "debug, info, warning or error", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must be between 0 and 65535")
        for name in ("request_timeout_s", "drain_timeout_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must not be negative")
