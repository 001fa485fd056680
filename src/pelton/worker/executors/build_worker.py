"""`build_executor`: model files and settings to an executor that is ready for its first step.

Nothing is measured by running the model: the KV cache is sized from what memory is left once the
weights are loaded.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pelton.core.batch import INBOX, OUTBOX
from pelton.core.errors import ConfigError
from pelton.core.events import EngineInfo
from pelton.core.lora import LoraAdapter
from pelton.core.model_spec import ModelSpec
from pelton.core.protocols import KVConnector, TokenDecoder
from pelton.engine.config import EngineConfig
from pelton.weights.channel_quantization import CHANNEL_QUANTIZATIONS, ChangedFiles, QuantizedFiles, in_groups
from pelton.weights.config import ModelConfig, parse_lora_modules
from pelton.weights.packed_files import content_identity, packed_folder, packed_path
from pelton.weights.shards import shard_spec
from pelton.weights.tensors import ModelFiles
from pelton.worker.adapters import LoadedAdapters
from pelton.worker.config import WorkerConfig
from pelton.worker.executors.host_resources import num_available_cores
from pelton.worker.executors.in_process import InProcessExecutor
from pelton.worker.executors.kv_plan import KVPlan, find_free_memory, gib, plan_on, wanted_model_len
from pelton.worker.kernels.ops import Kernels, choose_kernels
from pelton.worker.kv_disk import DiskStore
from pelton.worker.kv_format import KV_FORMATS
from pelton.worker.kv_storage import KVStorage
from pelton.worker.load_progress import LoadProgress
from pelton.worker.model_runner import ModelRunner
from pelton.worker.models.registry import Model, load_model, make_dummy_model
from pelton.worker.parallel import RankPlace, Ranks, wait_for_all
from pelton.worker.sampling.grammar import GrammarMatchers

if TYPE_CHECKING:
    from pelton.worker.executors.other_rank import OtherRank
    from pelton.worker.executors.sharded import ShardedExecutor

    WorkerExecutor = InProcessExecutor | ShardedExecutor

# Raised whenever kernels change how a block's bytes lie, or what they are.
_KV_LAYOUT_VERSION = 3


def build_executor(
    files: ModelFiles,
    model_config: ModelConfig,
    worker_config: WorkerConfig,
    engine_config: EngineConfig,
    *,
    eos_token_ids: Iterable[int],
    decoder: TokenDecoder | None = None,
    connect: Callable[[EngineInfo], KVConnector] | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> tuple[WorkerExecutor, EngineInfo]:
    """Load the model, allot the KV cache, start the executor's thread.

    `eos_token_ids` end a generation; the sampler bans them until a request's `min_tokens`. Without the
    model's `decoder`, requests with a grammar fail. `connect` makes what moves blocks from and to other engines.
    `on_progress` hears what share of the weights is loaded, now and then where that takes long.
    Raises `ConfigError` where the settings do not fit the model or the machine, `ModelFileError` or
    `UnsupportedModelError` where the files do not.
    """
    parts = (files, model_config, worker_config, engine_config)
    if worker_config.tensor_parallel_size == 1:
        return _build_here(parts, eos_token_ids, decoder, None, connect, on_progress)
    if connect is not None:
        raise ConfigError("KV blocks go to other engines from one rank only: leave kv_listen and kv_peers out")
    shard_spec(files.spec, worker_config.tensor_parallel_size)
    _check_sharded(model_config, worker_config, engine_config)
    from pelton.worker.executors.other_rank import build_beside
    from pelton.worker.executors.sharded import ShardedExecutor

    place, others = _start_others(files, model_config, worker_config, engine_config)
    try:
        own, info = build_beside(others, lambda: _build_here(parts, eos_token_ids, decoder, place, None, on_progress))
    except BaseException:
        for other in others:
            other.kill()
        raise
    finally:
        shutil.rmtree(Path(place.store).parent, ignore_errors=True)
    return ShardedExecutor(own, others), info


def _build_here(
    parts: tuple[ModelFiles, ModelConfig, WorkerConfig, EngineConfig],
    eos_token_ids: Iterable[int],
    decoder: TokenDecoder | None,
    place: RankPlace | None,
    connect: Callable[[EngineInfo], KVConnector] | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> tuple[InProcessExecutor, EngineInfo]:
    """The executor of this process, for the whole model or a rank of it."""
    start_s = time.perf_counter()
    files, _, worker_config, engine_config = parts
    wanted_model_len(files.spec, engine_config)
    num_threads = worker_config.threads or max(1, num_available_cores() // worker_config.tensor_parallel_size)
    kernels = choose_kernels(worker_config, num_threads, 0 if place is None else place.rank)
    ranks = None if place is None else _join(place, kernels, worker_config)
    try:
        executor, info = _build_on((kernels, num_threads), ranks, parts, eos_token_ids, decoder, connect, on_progress)
    except BaseException:
        if ranks is not None:
            ranks.leave()
        raise
    return executor, replace(info, load_s=time.perf_counter() - start_s)


def _build_on(
    kernels_and_threads: tuple[Kernels, int],
    ranks: Ranks | None,
    parts: tuple[ModelFiles, ModelConfig, WorkerConfig, EngineConfig],
    eos_token_ids: Iterable[int],
    decoder: TokenDecoder | None,
    connect: Callable[[EngineInfo], KVConnector] | None,
    on_progress: Callable[[float], None] | None,
) -> tuple[InProcessExecutor, EngineInfo]:
    (kernels, num_threads), (files, model_config, worker_config, engine_config) = kernels_and_threads, parts
    engine_config = engine_config.sized_for(kernels.step_size)
    step_size = engine_config.step_size()
    kv_dtype = _resolve_kv_dtype(worker_config.kv_cache_dtype, kernels)
    model = load_weights(files, model_config, worker_config, kernels, ranks, on_progress)
    spec = model.spec
    plan = plan_on(spec, engine_config, KV_FORMATS[kv_dtype], kernels, find_free_memory(kernels, ranks))
    if ranks is not None:
        plan = KVPlan(*ranks.least((plan.num_blocks, plan.max_model_len, plan.num_host_blocks)))
    kv = _allocate_kv(spec, plan, engine_config.block_size, kv_dtype, kernels)
    kv.take_ahead(0)
    matchers = GrammarMatchers(decoder, spec.vocab_size, shares=ranks is None) if decoder is not None else None
    adapters, lora_modules = load_adapters(model_config, model)
    runner = ModelRunner(
        model,
        kv,
        kernels.make_sampler(spec.vocab_size, eos_token_ids),
        block_size=engine_config.block_size,
        matchers=matchers,
        adapters=adapters,
        computes_in_pieces=ranks is None,  # one rank alone in pieces would leave the others waiting
    )
    info = EngineInfo(
        max_model_len=plan.max_model_len,
        num_blocks=plan.num_blocks,
        block_size=engine_config.block_size,
        max_num_seqs=step_size.num_requests,
        max_num_batched_tokens=step_size.num_tokens,
        max_num_waiting=engine_config.max_num_waiting,
        dtype=kernels.dtype,
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        device=kernels.device_name,
        kernels=kernels.name,
        num_threads=num_threads,
        enable_prefix_caching=engine_config.enable_prefix_caching,
        num_host_blocks=plan.num_host_blocks,
        kv_block_bytes=KV_FORMATS[kv_dtype].block_bytes(spec, engine_config.block_size),
        kv_identity=_kv_identity(files, model_config, worker_config, kernels, (kv_dtype, engine_config.block_size)),
        lora_modules=lora_modules,
        max_loras=model_config.max_loras,
    )
    store, on_close = _open_block_store(engine_config, info, kv), None if ranks is None else ranks.leave
    connector = None if connect is None else _connected(connect(info), kv)
    return InProcessExecutor(runner, store, matchers, adapters, on_close=on_close, connector=connector), info


def _join(place: RankPlace, kernels: Kernels, config: WorkerConfig) -> Ranks:
    """Waits until all ranks have come."""
    from pelton.worker.kernels.torch_ranks import TorchRanks

    wait_for_all(place)
    device = None if kernels.device_name == "cpu" else place.rank
    return TorchRanks(place.rank, place.size, place.store, device, batch_invariant=config.batch_invariance)


def _check_sharded(model_config: ModelConfig, worker_config: WorkerConfig, engine_config: EngineConfig) -> None:
    problem = None
    if worker_config.kernel_backend == "native":
        problem = "native kernels run on one rank: use --kernel-backend reference or triton"
    elif model_config.lora_modules:
        problem = "LoRA adapters run on one rank"
    elif engine_config.disk_kv_cache_dir is not None:
        problem = "KV blocks go to disk from one rank only: leave disk_kv_cache_dir out"
    if problem is not None:
        raise ConfigError(f"tensor_parallel_size is {worker_config.tensor_parallel_size}, but {problem}")


@dataclass(frozen=True, slots=True)
class RankSettings:
    """First line of a rank's standard input, as JSON."""

    model: ModelConfig
    worker: WorkerConfig
    engine: EngineConfig
    place: RankPlace


def _start_others(
    files: ModelFiles, model_config: ModelConfig, worker_config: WorkerConfig, engine_config: EngineConfig
) -> tuple[RankPlace, list[OtherRank]]:
    """The place of rank 0, and the processes of the others, once these have found their model."""
    import msgspec

    from pelton.worker.executors.other_rank import OtherRank
    from pelton.worker.executors.sharded import new_store

    place = RankPlace(0, worker_config.tensor_parallel_size, new_store())
    if model_config.load_format != "dummy":
        model_config = replace(model_config, model=str(files.path))
    others = []
    try:
        for rank in range(1, place.size):
            settings = RankSettings(model_config, worker_config, engine_config, replace(place, rank=rank))
            others.append(OtherRank(rank, msgspec.json.encode(settings)))
        for other in others:
            other.wait_until_ready()
    except BaseException:
        for other in others:
            other.kill()
        shutil.rmtree(Path(place.store).parent, ignore_errors=True)
        raise
    return place, others


def build_rank(settings: bytes, on_ready: Callable[[], object]) -> InProcessExecutor:
    """Another rank's executor, in its own process; `on_ready` is called once its model is found."""
    import msgspec

    from pelton.weights.catalog import resolve_model
    from pelton.weights.model_files import open_model
    from pelton.weights.tokenizer import load_decoder

    own = msgspec.json.decode(settings, type=RankSettings)
    path = resolve_model(own.model)
    files = open_model(path)
    decoder = load_decoder(path, own.model.tokenizer, files)
    on_ready()
    parts = (files, own.model, own.worker, own.engine)
    return _build_here(parts, decoder.eos_token_ids, decoder, own.place)[0]


def load_adapters(
    model_config: ModelConfig, model: Model
) -> tuple[LoadedAdapters, tuple[tuple[str, LoraAdapter], ...]]:
    """The store of adapters, with those that the settings name loaded."""
    store = LoadedAdapters(
        model.spec,
        model.lora_sites,
        model.kernels,
        max_loras=model_config.max_loras,
        max_rank=model_config.max_lora_rank,
    )
    named = parse_lora_modules(model_config.lora_modules)
    return store, tuple((module.name, store.load_now(module.path)) for module in named)


def _kv_identity(
    files: ModelFiles, model_config: ModelConfig, worker_config: WorkerConfig, kernels: Kernels, facts: tuple[str, int]
) -> str:
    """Of everything that KV's bytes depend on but its tokens: another model, kernel or layout gives another one.

    `facts`: type of the cache, block size.
    """
    model = repr(files.spec) if model_config.load_format == "dummy" else content_identity(files.path)
    how = (kernels.name, kernels.device_name, worker_config.batch_invariance, kernels.dtype)
    own = (version("pelton"), _KV_LAYOUT_VERSION, *how, worker_config.activation_dtype)
    return "|".join(map(str, (model, model_config.load_format, model_config.quantization, *own, *facts)))


def _open_block_store(config: EngineConfig, info: EngineInfo, kv: KVStorage) -> DiskStore | None:
    if config.disk_kv_cache_dir is None or not info.num_host_blocks or not config.enable_prefix_caching:
        return None
    folder = Path(config.disk_kv_cache_dir).expanduser()
    return DiskStore(folder, info.kv_identity, info.kv_block_bytes, kv.host_block)


def _connected(connector: KVConnector, kv: KVStorage) -> KVConnector:
    kv.add_tier(INBOX, connector.inbox)
    kv.add_tier(OUTBOX, connector.outbox)
    return connector


def _resolve_kv_dtype(name: str, kernels: Kernels) -> str:
    if name == "auto":
        return kernels.kv_dtypes[0]
    if name not in kernels.kv_dtypes:
        raise ConfigError(
            f"kv_cache_dtype is {name}, but {kernels.name} kernels store {' or '.join(kernels.kv_dtypes)}"
        )
    return name


def _weight_cache_path(files: ModelFiles, model_config: ModelConfig, config: WorkerConfig) -> Path | None:
    if not config.enable_weight_cache:
        return None
    folder = Path(config.weight_cache_dir).expanduser() if config.weight_cache_dir else packed_folder(model_config)
    return packed_path(folder, files.path, model_config.quantization)


def load_weights(
    files: ModelFiles,
    model_config: ModelConfig,
    worker_config: WorkerConfig,
    kernels: Kernels,
    ranks: Ranks | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Model:
    """Checked by size first: Linux grants memory that it does not have, and kills the process later."""
    if model_config.quantization is not None and model_config.quantization not in CHANNEL_QUANTIZATIONS:
        kernels.round_weights(model_config.quantization)
    if model_config.load_format == "dummy":
        try:
            with kernels.weight_cache(files, None):
                return make_dummy_model(files.spec, kernels, ranks)
        except MemoryError as error:
            raise ConfigError("out of memory while making dummy weights: choose a smaller model") from error
    files = _as_multiplied(files, model_config, worker_config)
    num_bytes = sum(kernels.num_weight_bytes(files.tensor(name)) for name in files.tensor_names())
    progress = None if on_progress is None else LoadProgress(num_bytes, kernels.num_weight_bytes, on_progress)
    num_bytes //= 1 if ranks is None else ranks.size  # nearly
    num_free = find_free_memory(kernels, ranks).num_bytes
    size = f"{gib(num_bytes)} as {kernels.dtype}"
    if num_bytes > num_free:
        raise ConfigError(
            f"the weights take {size}, but {gib(num_free)} are free: use a smaller model or --dtype bfloat16"
        )
    try:
        with kernels.weight_cache(files, _weight_cache_path(files, model_config, worker_config)):
            model = load_model(files if progress is None else ChangedFiles(files, progress.pass_on), kernels, ranks)
    except MemoryError as error:
        raise ConfigError(f"out of memory while loading the weights ({size})") from error
    files.drop_pages()
    return model


def _as_multiplied(files: ModelFiles, model_config: ModelConfig, worker_config: WorkerConfig) -> ModelFiles:
    """With the rounding that was asked for, of weights and of activations."""
    if model_config.quantization in CHANNEL_QUANTIZATIONS:
        files = QuantizedFiles(files, model_config.quantization)
    return ChangedFiles(files, in_groups) if worker_config.activation_dtype in ("bfloat16", "float32") else files


def _allocate_kv(spec: ModelSpec, plan: KVPlan, block_size: int, dtype: str, kernels: Kernels) -> KVStorage:
    try:
        return KVStorage(spec, plan.num_blocks, block_size, dtype, kernels, num_host_blocks=plan.num_host_blocks)
    except MemoryError as error:
        size = gib((plan.num_blocks + plan.num_host_blocks) * KV_FORMATS[dtype].block_bytes(spec, block_size))
        raise ConfigError(
            f"the KV cache of {plan.num_blocks} blocks and {plan.num_host_blocks} in host memory ({size}) could not be "
            "allocated: lower num_kv_blocks or kv_cache_memory_gb, or host_kv_cache_gb"
        ) from error
