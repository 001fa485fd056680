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
    admin_api_key: str | None = setting(None, "key of the admin API, /admin/v1, beside stored keys with that scope")
    served_model_name: tuple[str, ...] = setting((), "names clients may use; default: the model's own")
    chat_template: str | None = setting(None, "file with a Jinja chat template, instead of the model's own")
    tool_call_parser: str | None = setting(None, "how the model writes tool calls; default: as its chat template tells")
    enable_auto_tool_choice: bool = setting(True, "the model may choose by itself to call tools")
    reasoning_parser: str | None = setting(None, "how the model marks reasoning; default: as its chat template tells")
    enable_force_include_usage: bool = setting(
        False, "every chunk of a stream reports usage, whatever stream_options says"
    )
    request_timeout_s: float = setting(600.0, "deadline of a request that brings none; 0: none")
    drain_timeout_s: float = setting(30.0, "on SIGTERM, how long running requests may take to finish")
    max_body_bytes: int = setting(32 * 2**20, "largest request body")
    response_retention_days: float = setting(30.0, "how long stored responses and chat completions are kept")
    max_stored_responses: int = setting(100_000, "how many of each are kept of a tenant, the latest")
    pooling: str | None = setting(
        None,
        "embeddings: last, mean or cls; default: what the model's folder says, or last",
        choices=("last", "mean", "cls"),
    )
    max_file_bytes: int = setting(100 * 2**20, "largest file that may be uploaded")
    max_stored_bytes: int = setting(10 * 2**30, "most bytes of a tenant's files, those that batches wrote included")
    max_batch_lines: int = setting(50_000, "most lines of a batch")
    batch_concurrency: int = setting(16, "most lines of batches that run at a time, while nobody else uses the engine")
    score_tokens: tuple[str, ...] = setting(
        (), "two words that a reranker answers with, the good one first, such as yes,no; default: cosine of embeddings"
    )
    cors_origins: tuple[str, ...] = setting(
        (), "origins that browsers may call from; default: none", alias="--allowed-origins"
    )
    root_path: str = setting("", "path that a proxy leaves before all others, such as /llm; both ways are answered")
    ssl_certfile: str | None = setting(None, "PEM file with the certificate chain: HTTPS instead of HTTP")
    ssl_keyfile: str | None = setting(None, "PEM file with the certificate's private key")
    max_header_bytes: int = setting(64 * 2**10, "largest head of a request: its line and all its headers")
    header_timeout_s: float = setting(20.0, "how long a client may take to send the head of a request")
    allow_runtime_lora_updating: bool = setting(
        False, "let clients load and unload LoRA adapters from this machine's files: /v1/load_lora_adapter"
    )
    log_level: str = setting("info", "debug, info, warning or error", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must be between 0 and 65535")
        if self.tool_call_parser is not None:
            from pelton.serving.tools import TOOL_CALL_NAMES

            _check_name("tool_call_parser", self.tool_call_parser, TOOL_CALL_NAMES)
        if self.reasoning_parser is not None:
            from pelton.serving.reasoning import REASONING_NAMES

            _check_name("reasoning_parser", self.reasoning_parser, REASONING_NAMES)
        if len(self.score_tokens) not in (0, 2):
            raise ConfigError(f"score_tokens names {len(self.score_tokens)} words; it must be two, such as yes,no")
        for name in ("max_file_bytes", "max_stored_bytes", "max_batch_lines", "batch_concurrency"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.root_path and (self.root_path[0] != "/" or self.root_path[-1] == "/"):
            raise ConfigError(f"root_path is {self.root_path!r}; it must begin with a slash and end without one")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("ssl_certfile and ssl_keyfile go together")
        for name in ("max_header_bytes", "header_timeout_s", "max_body_bytes", "max_stored_responses"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("request_timeout_s", "drain_timeout_s", "response_retention_days"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must not be negative")


def _check_name(setting_name: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ConfigError(f"{setting_name} is {name!r}; it must be one of {', '.join(known)}")
