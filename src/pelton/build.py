"""Where parts are chosen and joined: the only module that names concrete classes across rooms."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from pelton.core.protocols import MonotonicClock
from pelton.engine.client import EngineClient
from pelton.engine.config import EngineConfig
from pelton.engine.engine import Engine
from pelton.engine.kv.block_pool import BlockPool
from pelton.engine.kv.manager import KVManager
from pelton.engine.policies import POLICIES
from pelton.engine.process import ProcessTransport
from pelton.engine.scheduler import Scheduler
from pelton.engine.thread import ThreadTransport
from pelton.serving.config import ServerConfig
from pelton.weights.config import ModelConfig
from pelton.worker.config import WorkerConfig

if TYPE_CHECKING:
    from pelton.weights.catalog.progress import ProgressCallback


@dataclass(frozen=True, slots=True, kw_only=True)
class PeltonConfig:
    """Every room's settings, resolved once."""

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    server: ServerConfig = field(default_factory=ServerConfig)


def build_engine(config: PeltonConfig) -> Engine:
    """Load the model and join scheduler, KV manager and executor. Imports torch."""
    from pelton.weights.catalog import resolve_model
    from pelton.weights.model_files import open_model
    from pelton.weights.tokenizer import load_tokenizer
    from pelton.worker.executors.build_worker import build_executor

    path = resolve_model(config.model)
    files = open_model(path)
    tokenizer = load_tokenizer(path, config.model.tokenizer)
    executor, info = build_executor(
        files, config.model, config.worker, config.engine, eos_token_ids=tokenizer.eos_token_ids
    )
    kv = KVManager(
        files.spec.kv_groups,
        BlockPool(info.num_blocks),
        info.block_size,
        enable_prefix_caching=info.enable_prefix_caching,
        identity=f"{path}|{info.dtype}",
    )
    clock = MonotonicClock()
    scheduler = Scheduler(
        POLICIES[config.engine.scheduling_policy](),
        kv,
        clock,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        long_prefill_chunk=config.engine.long_prefill_chunk,
    )
    return Engine(scheduler, executor, tokenizer, clock, info, enable_overlap=config.engine.enable_overlap)


def build_engine_from_settings(settings: bytes) -> Engine:
    """As `build_engine`, from the JSON that `build_process_client` sends to the engine's process."""
    return build_engine(msgspec.json.decode(settings, type=PeltonConfig))


def build_process_client(config: PeltonConfig) -> EngineClient:
    """An engine in a process of its own."""
    command = [sys.executable, "-m", "pelton.cli.engine_process"]
    return EngineClient(ProcessTransport(command, msgspec.json.encode(config)))


def build_thread_client(config: PeltonConfig) -> EngineClient:
    """An engine on a thread of this process."""
    return EngineClient(ThreadTransport(partial(build_engine, config)), restart=False)


def pull_model(config: PeltonConfig, progress: ProgressCallback | None = None) -> PeltonConfig:
    """Have the model on disk, and name it by its path from here on."""
    from pelton.weights.catalog import resolve_model

    path = resolve_model(config.model) if progress is None else resolve_model(config.model, progress)
    return replace(config, model=replace(config.model, model=str(path)))
