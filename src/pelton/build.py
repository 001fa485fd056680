"""Where parts are chosen and joined: the only module that names concrete classes across rooms."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pelton.cluster.config import TransferConfig
from pelton.core.config import setting_names
from pelton.core.errors import ConfigError
from pelton.engine.config import EngineConfig
from pelton.serving.config import ServerConfig
from pelton.store.config import StoreConfig
from pelton.weights.config import ModelConfig, parse_lora_modules
from pelton.worker.config import WorkerConfig

# Parts are imported where they are joined: each process loads only its own.
if TYPE_CHECKING:
    from starlette.applications import Starlette

    from pelton.bench.roofline import KernelBenchPlan, KernelReport
    from pelton.bench.step_profile import StepProfile, StepProfilePlan
    from pelton.core.events import EngineInfo
    from pelton.core.model_spec import KVGroupSpec
    from pelton.core.protocols import Clock, Executor, KVConnector, TokenDecoder, WorkerStores
    from pelton.engine.client import EngineClient
    from pelton.engine.engine import Engine
    from pelton.engine.kv.costs import KVCosts
    from pelton.engine.kv.manager import KVManager
    from pelton.simulate.cost import StepCost
    from pelton.simulate.server import SimulatedServer


@dataclass(frozen=True, slots=True, kw_only=True)
class PeltonConfig:
    """Every room's settings, resolved once."""

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> PeltonConfig:
        """From settings by name, whatever their room. An unknown name is a `ConfigError` with the nearest."""
        rooms: dict[str, type] = {
            "model": ModelConfig,
            "engine": EngineConfig,
            "worker": WorkerConfig,
            "server": ServerConfig,
            "store": StoreConfig,
            "transfer": TransferConfig,
        }
        room_of = {name: room for room, config_class in rooms.items() for name in setting_names(config_class)}
        values: dict[str, dict[str, Any]] = {room: {} for room in rooms}
        for name, value in settings.items():
            if name not in room_of:
                from difflib import get_close_matches

                nearest = get_close_matches(name, room_of, n=1)
                hint = f"; the nearest is {nearest[0]}" if nearest else ""
                raise ConfigError(f"there is no setting {name}{hint}")
            values[room_of[name]][name] = value
        return cls(**{room: config_class(**values[room]) for room, config_class in rooms.items()})


def build_engine(
    config: PeltonConfig, decoder: TokenDecoder | None = None, on_progress: Callable[[float], None] | None = None
) -> Engine:
    """Load the model and join scheduler, KV manager and executor.

    `decoder` is the model's, where the caller has it already. `on_progress` is `build_executor`'s.
    """
    from pelton.core.protocols import MonotonicClock
    from pelton.weights.catalog import resolve_model
    from pelton.weights.model_files import open_model
    from pelton.weights.tokenizer import load_decoder
    from pelton.worker.executors.build_worker import build_executor

    path = resolve_model(config.model)
    files = open_model(path)
    decoder = decoder or load_decoder(path, config.model.tokenizer, files)
    worker, info = build_executor(
        files,
        config.model,
        config.worker,
        config.engine,
        eos_token_ids=decoder.eos_token_ids,
        decoder=decoder,
        connect=partial(connect_peers, config.transfer) if config.transfer.is_on else None,
        on_progress=on_progress,
    )
    executor: Executor = worker
    if config.engine.step_log is not None:
        from pelton.simulate.step_log import StepLogExecutor

        executor = StepLogExecutor(worker, Path(config.engine.step_log), info.block_size)
    clock, groups = MonotonicClock(), files.spec.kv_groups
    engine = join_engine(config.engine, executor, info, decoder, clock, groups, worker)
    if worker.matchers is not None:
        engine.grammars.prepare = worker.matchers.prepare
    return engine


def join_engine(
    config: EngineConfig,
    executor: Executor,
    info: EngineInfo,
    decoder: TokenDecoder,
    clock: Clock,
    groups: tuple[KVGroupSpec, ...],
    stores: WorkerStores | None = None,
) -> Engine:
    """The control plane that `config` asks for, over whatever executes and tells the time."""
    from pelton.core.tenant import parse_tenants
    from pelton.engine.adapters import AdapterTable
    from pelton.engine.engine import Engine
    from pelton.engine.kv.costs import KVCosts
    from pelton.engine.policies import POLICIES
    from pelton.engine.policies.context import PolicyContext
    from pelton.engine.scheduler import Scheduler
    from pelton.engine.step_budget import make_budget

    costs = KVCosts(
        len(groups) * info.kv_block_bytes // info.block_size,
        chunk=config.long_prefill_chunk or info.max_num_batched_tokens,
    )
    kv = build_kv_manager(groups, config, info, clock, costs, stores)
    policy_context = PolicyContext(
        tenants=parse_tenants(config.tenants),
        clock=clock,
        num_blocks=info.num_blocks,
        kv_charge=config.kv_charge,
        num_cached_tokens=lambda request: kv.match(request).num_tokens,
        num_blocks_needed=lambda request: kv.num_blocks_to_reach(request, request.num_tokens),
    )
    scheduler = Scheduler(
        POLICIES[config.scheduling_policy](policy_context),
        kv,
        clock,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        long_prefill_chunk=config.long_prefill_chunk,
        budget=make_budget(config.tpot_slo_ms, info.max_num_batched_tokens),
    )
    engine = Engine(
        scheduler,
        executor,
        decoder,
        clock,
        info,
        tenants=policy_context.tenants,
        costs=costs,
        enable_overlap=config.enable_overlap,
    )
    adapters = stores.adapters if stores is not None else None
    engine.adapters = AdapterTable(adapters, (adapter for _, adapter in info.lora_modules))
    return engine


def build_simulated_server(config: EngineConfig, cost: StepCost) -> SimulatedServer:
    """The production engine over a cost function. Call on the virtual loop of `simulate.clock`."""
    import asyncio

    from pelton.core.model_spec import KVGroupSpec
    from pelton.simulate.clock import VirtualTimeLoop
    from pelton.simulate.executor import CostExecutor, OneLetterDecoder, simulated_info
    from pelton.simulate.server import SimulatedServer

    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    executor = CostExecutor(cost, config.block_size, loop)
    info = simulated_info(config, cost)
    engine = join_engine(config, executor, info, OneLetterDecoder(), loop.clock, (KVGroupSpec((0,)),))
    return SimulatedServer(engine, executor)


def build_kv_manager(
    groups: tuple[KVGroupSpec, ...],
    config: EngineConfig,
    info: EngineInfo,
    clock: Clock,
    costs: KVCosts,
    stores: WorkerStores | None = None,
) -> KVManager:
    """The pool of the device, the tiers behind it and the way to other engines. Loads no model, nor do simulations,
    which build theirs here too."""
    from pelton.engine.kv.block_pool import BlockPool
    from pelton.engine.kv.disk import DiskTier
    from pelton.engine.kv.eviction import EVICTIONS
    from pelton.engine.kv.manager import KVManager
    from pelton.engine.kv.tiers import KVTiers

    def block_cost(index: int) -> float:
        """Of one more block in a chunk: what every step costs is the same for all."""
        prefill = costs.prefill.coefficients
        start = index * info.block_size
        return info.block_size * (prefill.token_s + prefill.position_s * start)

    make_eviction = partial(EVICTIONS[config.kv_eviction_policy], clock, block_cost)
    tiers = None
    if info.num_host_blocks > 1:
        host = BlockPool(info.num_host_blocks, make_eviction())
        disk = None
        if stores is not None and stores.block_store is not None:
            disk = DiskTier(stores.block_store, host, costs, max_bytes=int(config.disk_kv_cache_gb * 2**30))
        tiers = KVTiers(host, costs, num_block_bytes=info.kv_block_bytes, disk=disk)
    kv = KVManager(
        groups,
        BlockPool(info.num_blocks, make_eviction()),
        info.block_size,
        enable_prefix_caching=info.enable_prefix_caching,
        identity=info.kv_identity,
        tiers=tiers,
    )
    if stores is not None and stores.connector is not None:
        from pelton.engine.kv.transfer import KVTransfer

        kv.transfer = KVTransfer(stores.connector, kv.pool, tiers, kv.ops, costs, num_block_bytes=info.kv_block_bytes)
    return kv


def connect_peers(config: TransferConfig, info: EngineInfo) -> KVConnector:
    """What moves KV blocks from and to other engines, as far as there is memory for them."""
    from pelton.cluster.transfer import open_connector
    from pelton.worker.executors.host_resources import num_available_memory_bytes

    if not info.enable_prefix_caching:
        raise ConfigError("kv_listen and kv_peers need prefix caching, which keeps the blocks: enable_prefix_caching")
    num_bytes = int(config.kv_transfer_gb * 2**30) * (bool(config.kv_listen) + bool(config.kv_peers))
    if num_bytes > num_available_memory_bytes():
        raise ConfigError(
            f"kv_transfer_gb is {config.kv_transfer_gb}, but {num_available_memory_bytes() / 2**30:.2f} GiB are free"
        )
    return open_connector(config, info)


def build_engine_from_settings(settings: bytes) -> Engine:
    """As `build_engine`, from the JSON that `build_process_client` sends to the engine's process."""
    config = msgspec.json.decode(settings, type=PeltonConfig)
    is_quiet = config.server.log_level in ("warning", "error")
    return build_engine(config, on_progress=None if is_quiet else _log_progress)


def _log_progress(share: float) -> None:
    from pelton.serving.logs import Logger

    Logger().info("loading weights", percent=round(100 * share))


def build_process_client(config: PeltonConfig) -> EngineClient:
    """An engine in a process of its own, which starts now and is waited for by the client's `start`."""
    from pelton.engine.client import EngineClient
    from pelton.engine.process import ProcessTransport

    command = [sys.executable, "-m", "pelton.cli.engine_process"]
    transport = ProcessTransport(command, msgspec.json.encode(config))
    transport.launch()
    return EngineClient(transport)


def build_thread_client(config: PeltonConfig, decoder: TokenDecoder) -> EngineClient:
    """An engine on a thread of this process."""
    from pelton.engine.client import EngineClient
    from pelton.engine.thread import ThreadTransport

    return EngineClient(ThreadTransport(partial(build_engine, config, decoder)), restart=False)


def serve(config: PeltonConfig) -> int:
    """Run the HTTP server until it is told to stop; returns the exit code. The model must be on disk."""
    from pelton.weights.catalog import resolve_model

    gc.disable()  # almost all that is made until the engine is ready stays
    path = resolve_model(config.model)
    # The engine's process first: it loads the model while this one imports the web server.
    client = build_process_client(replace(config, model=replace(config.model, model=str(path))))

    from pelton.serving.server import run_server

    return run_server(partial(build_app, config, path, client), client, config.server)


def build_app(config: PeltonConfig, path: Path, client: EngineClient) -> Starlette:
    """The HTTP application over `client`, for the model at `path`."""
    from pelton.weights.model_files import open_model
    from pelton.weights.tokenizer import load_tokenizer

    files = open_model(path)
    # Before the application is imported: it takes twice its memory for a moment.
    tokenizer = load_tokenizer(path, config.model.tokenizer, files)
    _give_back_freed_memory()

    from pelton.serving.app import create_app
    from pelton.serving.context import ModelCard
    from pelton.store.opener import Store
    from pelton.weights.pooling import declared_pooling

    names = config.server.served_model_name or (model_name(config.model.model),)
    for module in parse_lora_modules(config.model.lora_modules):
        if module.name in names:
            raise ConfigError(f"lora_modules: {module.name!r} is the name of the model itself")
    return create_app(
        client,
        tokenizer,
        ModelCard(
            names=names,
            root=config.model.model,
            max_model_len=files.spec.max_model_len,
            created=int(path.stat().st_mtime),
            pooling=config.server.pooling or declared_pooling(path) or "last",
        ),
        config.server,
        chat_template=read_chat_template(config.server.chat_template) or files.chat_template,
        generation_defaults=files.generation_defaults,
        store=Store(config.store),
    )


def _give_back_freed_memory() -> None:
    """The C library keeps what a thread other than the first has freed, unless it is told; others than glibc do not."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def read_chat_template(path: str | None) -> str | None:
    """The source of a template file that replaces the model's own."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template: {path} cannot be read: {error}") from error


def model_name(model: str) -> str:
    """What clients call a model: its catalog name or hub id as it was given, a file's or folder's name."""
    path = Path(model)
    if path.exists():
        path = path.resolve()
        return path.stem if path.suffix == ".gguf" else path.name
    return model


def describe_worker(config: WorkerConfig) -> dict[str, Any]:
    """What the worker's settings come to on this machine."""
    from pelton.worker.executors.host_resources import num_available_cores
    from pelton.worker.kernels.ops import choose_kernels

    return {
        "kernel_backend": choose_kernels(config).name,
        "threads": config.threads or num_available_cores(),
    }


def measure_kernels(
    config: PeltonConfig, plan: KernelBenchPlan, isa: str | None, on_progress: Callable[[str], None]
) -> KernelReport:
    """The native kernels on the weights of a model that is on disk. Imports no torch."""
    from pelton.weights.catalog import resolve_model
    from pelton.weights.model_files import open_model
    from pelton.worker.executors.host_resources import num_available_cores, num_available_memory_bytes
    from pelton.worker.kernels.cpu.measure import kernels

    files = open_model(resolve_model(config.model))
    runtime = kernels.make_runtime(isa, config.worker.threads or num_available_cores())
    on_progress("ceilings")
    ceilings = kernels.measure_ceilings(runtime.num_threads, num_available_memory_bytes())
    return kernels.measure_kernels(files, runtime, ceilings, plan, on_progress)


def profile_steps(
    config: PeltonConfig, plan: StepProfilePlan, isa: str | None, on_progress: Callable[[str], None]
) -> tuple[str, list[StepProfile]]:
    """Steps of a model on disk over a text that is always there: the kernels' name, and where time went, op by op."""
    from pelton.weights.catalog import resolve_model
    from pelton.weights.model_files import open_model
    from pelton.weights.tokenizer import load_tokenizer
    from pelton.worker.executors import step_profile

    path = resolve_model(config.model)
    files = open_model(path)
    text = "\n".join(source.read_text("utf-8") for source in sorted(Path(__file__).parent.glob("*.py")))
    token_ids = load_tokenizer(path, config.model.tokenizer, files).encode(text)
    return step_profile.profile_steps(files, (config.model, config.worker), plan, token_ids, isa, on_progress)
