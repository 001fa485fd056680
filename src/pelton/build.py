"""Where parts are chosen and joined: the only module that names concrete classes across rooms."""

from __future__ import annotations

from dataclasses import dataclass, field

from pelton.engine.config import EngineConfig
from pelton.serving.config import ServerConfig
from pelton.weights.config import ModelConfig
from pelton.worker.config import WorkerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PeltonConfig:
    """Every room's settings, resolved once."""

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
