"""`build_executor`: model files and settings to an executor that is ready for its first step.

Nothing is measured by running the model: the KV cache is sized from what memory is left once the
weights are loaded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pelton.core.errors import ConfigError
from pelton.core.events import EngineInfo
from pelton.core.lora import LoraAdapter
from pelton.core.model_spec import ModelSpec
from pelton.core.protocols import TokenDecoder
from pelton.engine.config import EngineConfig
from pelton.weights.channel_quantization import CHANNEL_QUANTIZATIONS, ChangedFiles, QuantizedFiles, in_groups
from pelton.weights.config import ModelConfig, parse_lora_modules
from pelton.weights.packed_files import content_identity, packed_folder, packed_path
from pelton.weights.tensors import ModelFiles
from pelton.worker.adapters import LoadedAdapters
from pelton.worker.config import WorkerConfig
from pelton.worker.executors.host_resources import num_available_cores, num_available_memory_bytes
from pelton.worker.executors.in_process import InProcessExecutor
from pelton.worker.kernels.ops import DTYPE_BYTES, Kernels, choose_kernels
from pelton.worker.kv_disk import DiskStore
from pelton.worker.kv_format import KV_FORMATS, KVFormat
from pelton.worker.kv_storage import KVStorage
from pelton.worker.model_runner import ModelRunner
from pelton.worker.models.registry import Model, load_model, make_dummy_model
from pelton.worker.sampling.grammar import GrammarMatchers

_GIB = 2**30
# Raised whenever kernels change how a block's bytes lie, or what they are.
_KV_LAYOUT_VERSION = 2
_MAX_DEFAULT_BYTES = 4 * _GIB
_DEVICE_RESERVE_BYTES = 2 * _GIB


def build_executor(
    files: ModelFiles,
    model_config: ModelConfig,
    worker_config: WorkerConfig,
    engine_config: EngineConfig,
    *,
    eos_token_ids: Iterable[int],
    decoder: TokenDecoder | None = None,
) -> tuple[InProcessExecutor, EngineInfo]:
    """Load the model, allot the KV cache, start the executor's thread.

    `eos_token_ids` end a generation; the sampler bans them until a request's `min_tokens`. Without the
    model's `decoder`, requests with a grammar fail. Raises `ConfigError` where the settings do not fit the
    model or the machine, `ModelFileError` or `UnsupportedModelError` where the files do not.
    """
    start_s = time.perf_counter()
    spec = files.spec
    wanted_model_len(spec, engine_config)
    num_threads = worker_config.threads or num_available_cores()
    kernels = choose_kernels(worker_config, num_threads)
    engine_config = engine_config.sized_for(kernels.step_size)
    step_size = engine_config.step_size()
    kv_dtype = _resolve_kv_dtype(worker_config.kv_cache_dtype, kernels)
    model = load_weights(files, model_config, worker_config, kernels)
    plan = _plan_kv_cache(spec, engine_config, KV_FORMATS[kv_dtype], kernels)
    kv = _allocate_kv(spec, plan, engine_config.block_size, kv_dtype, kernels)
    block_bytes = KV_FORMATS[kv_dtype].block_bytes(spec, engine_config.block_size)
    sampler = kernels.make_sampler(spec.vocab_size, eos_token_ids)
    threading.Thread(target=kv.warm_up, name="pelton-kv-warm-up", daemon=True).start()
    matchers = GrammarMatchers(decoder, spec.vocab_size) if decoder is not None else None
    adapters, lora_modules = load_adapters(model_config, model)
    runner = ModelRunner(model, kv, sampler, block_size=engine_config.block_size, matchers=matchers, adapters=adapters)
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
        load_s=time.perf_counter() - start_s,
        num_host_blocks=plan.num_host_blocks,
        kv_block_bytes=block_bytes,
        kv_identity=_kv_identity(files, model_config, worker_config, kernels, (kv_dtype, engine_config.block_size)),
        lora_modules=lora_modules,
        max_loras=model_config.max_loras,
    )
    return InProcessExecutor(runner, _open_block_store(engine_config, info, kv), matchers, adapters), info


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
    own = (version("pelton"), _KV_LAYOUT_VERSION, kernels.name, kernels.dtype, worker_config.activation_dtype)
    return "|".join(map(str, (model, model_config.load_format, model_config.quantization, *own, *facts)))


def _open_block_store(config: EngineConfig, info: EngineInfo, kv: KVStorage) -> DiskStore | None:
    if config.disk_kv_cache_dir is None or not info.num_host_blocks or not config.enable_prefix_caching:
        return None
    folder = Path(config.disk_kv_cache_dir).expanduser()
    return DiskStore(folder, info.kv_identity, info.kv_block_bytes, kv.host_block)


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


def load_weights(files: ModelFiles, model_config: ModelConfig, worker_config: WorkerConfig, kernels: Kernels) -> Model:
    """Checked by size first: Linux grants memory that it does not have, and kills the process later."""
    if model_config.quantization is not None and model_config.quantization not in CHANNEL_QUANTIZATIONS:
        kernels.round_weights(model_config.quantization)
    if model_config.load_format == "dummy":
        try:
            with kernels.weight_cache(files, None):
                return make_dummy_model(files.spec, kernels)
        except MemoryError as error:
            raise ConfigError("out of memory while making dummy weights: choose a smaller model") from error
    files = _as_multiplied(files, model_config, worker_config)
    num_bytes = sum(kernels.num_weight_bytes(files.tensor(name)) for name in files.tensor_names())
    num_free = kernels.num_free_bytes()
    if num_free is None:
        num_free = num_available_memory_bytes()
    size = f"{_gib(num_bytes)} as {kernels.dtype}"
    if num_bytes > num_free:
        raise ConfigError(
            f"the weights take {size}, but {_gib(num_free)} are free: use a smaller model or --dtype bfloat16"
        )
    try:
        with kernels.weight_cache(files, _weight_cache_path(files, model_config, worker_config)):
            model = load_model(files, kernels)
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
        size = _gib((plan.num_blocks + plan.num_host_blocks) * KV_FORMATS[dtype].block_bytes(spec, block_size))
        raise ConfigError(
            f"the KV cache of {plan.num_blocks} blocks and {plan.num_host_blocks} in host memory ({size}) could not be "
            "allocated: lower num_kv_blocks or kv_cache_memory_gb, or host_kv_cache_gb"
        ) from error


@dataclass(frozen=True, slots=True)
class KVPlan:
    num_blocks: int  # the null block included
    max_model_len: int
    num_host_blocks: int = 0  # likewise, behind the cache


def wanted_model_len(spec: ModelSpec, config: EngineConfig) -> int:
    """The model's own limit or a shorter one asked for. Raises `ConfigError` for a longer one."""
    if config.max_model_len is None:
        return spec.max_model_len
    if config.max_model_len > spec.max_model_len:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, but the model supports at most {spec.max_model_len} tokens"
        )
    return config.max_model_len


def _plan_kv_cache(spec: ModelSpec, config: EngineConfig, kv_format: KVFormat, kernels: Kernels) -> KVPlan:
    num_host_bytes, num_device_bytes = num_available_memory_bytes(), kernels.num_free_bytes()
    if num_device_bytes is None:
        return plan_kv_cache(spec, config, kv_format, num_host_bytes)
    num_bytes = max(0, num_device_bytes - step_bytes(spec, config, DTYPE_BYTES[kernels.dtype], kernels.max_logits_rows))
    return plan_kv_cache(spec, config, kv_format, num_bytes, num_host_bytes)


def step_bytes(spec: ModelSpec, config: EngineConfig, bytes_per_element: int, max_logits_rows: int) -> int:
    """What a step takes of a device beside weights and cache, at most: no step is run to find it out.

    Activations of one layer at a time (a few tensors of its widths live at once), logits twice over, and what the
    driver, captured graphs and libraries keep.
    """
    query_size = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    row_bytes = (6 * spec.hidden_size + 3 * query_size + 3 * spec.intermediate_size) * bytes_per_element
    step_size = config.step_size()
    num_logits = min(step_size.num_requests, max_logits_rows) * spec.vocab_size
    return step_size.num_tokens * row_bytes + 2 * 4 * num_logits + _DEVICE_RESERVE_BYTES


def plan_kv_cache(
    spec: ModelSpec,
    config: EngineConfig,
    kv_format: KVFormat,
    num_available_bytes: int,
    num_host_bytes: int | None = None,
) -> KVPlan:
    """Size the pool and fit `max_model_len` to it.

    `num_available_bytes` is what is free once the weights are loaded; of a device that has `num_host_bytes` of host
    memory beside it, else of the host itself. Raises `ConfigError` where the pool asked for exceeds it, or cannot
    hold a request worth serving.
    """
    block_bytes = kv_format.block_bytes(spec, config.block_size)
    wanted_len = wanted_model_len(spec, config)
    num_useful = 1 + config.step_size().num_requests * num_blocks_of_request(spec, config, wanted_len)
    if config.num_kv_blocks is not None:
        num_blocks = config.num_kv_blocks
    elif config.kv_cache_memory_gb is not None:
        num_blocks = int(config.kv_cache_memory_gb * _GIB) // block_bytes
    else:
        num_default_bytes = num_available_bytes  # of a device: nobody else wants it
        if num_host_bytes is None:
            num_default_bytes = min(num_available_bytes // 4, _MAX_DEFAULT_BYTES)
        num_blocks = min(num_default_bytes // block_bytes, num_useful)
    if num_blocks * block_bytes > num_available_bytes:
        raise ConfigError(
            f"{num_blocks} KV blocks take {_gib(num_blocks * block_bytes)}, but {_gib(num_available_bytes)} are free "
            f"beside the weights: ask for at most {num_available_bytes // block_bytes} (num_kv_blocks) or "
            f"{_gib(num_available_bytes)} (kv_cache_memory_gb)"
        )
    # A pool that cannot hold two blocks' worth of tokens would refuse almost every request.
    least_len = min(wanted_len, 2 * config.block_size)
    num_least = 1 + num_blocks_of_request(spec, config, least_len)
    if num_blocks < num_least:
        num_full = 1 + num_blocks_of_request(spec, config, wanted_len)
        raise ConfigError(
            f"the KV cache holds {num_blocks} blocks, too few to serve anything: at least {num_least} are needed, and "
            f"{num_full} ({_gib(num_full * block_bytes)}) for one request of {wanted_len} tokens; raise "
            "num_kv_blocks or kv_cache_memory_gb"
        )
    if num_host_bytes is None:
        num_host_bytes, num_default = num_available_bytes - num_blocks * block_bytes, num_available_bytes // 8
    else:
        num_default = min(num_host_bytes // 8, _MAX_DEFAULT_BYTES)  # pinned at once: taken, and slowly
    num_host_blocks = _plan_host_blocks(config, block_bytes, num_blocks, (num_host_bytes, num_default))
    return KVPlan(num_blocks, _longest_request(spec, config, num_blocks - 1, wanted_len), num_host_blocks)


def _plan_host_blocks(config: EngineConfig, block_bytes: int, num_blocks: int, host_bytes: tuple[int, int]) -> int:
    """`host_bytes`: what is free, what is taken unless told otherwise."""
    num_free, num_default = host_bytes
    if config.host_kv_cache_gb is None:
        return min(num_blocks, num_default // block_bytes)
    num_host_blocks = int(config.host_kv_cache_gb * _GIB) // block_bytes
    if num_host_blocks * block_bytes > num_free:
        raise ConfigError(
            f"host_kv_cache_gb is {config.host_kv_cache_gb}, but {_gib(num_free)} are free beside the weights and the "
            "KV cache"
        )
    return num_host_blocks


def num_blocks_of_request(spec: ModelSpec, config: EngineConfig, num_tokens: int) -> int:
    """Blocks that one request of `num_tokens` holds at most, over all KV groups."""
    max_step_tokens = config.long_prefill_chunk or config.step_size().num_tokens
    total = 0
    for group in spec.kv_groups:
        num_held = num_tokens
        if group.sliding_window is not None:
            # The window, the step being written, and a block in part at either end.
            num_held = min(num_held, group.sliding_window + max_step_tokens + 2 * config.block_size)
        total += -(-num_held // config.block_size)
    return total


def _longest_request(spec: ModelSpec, config: EngineConfig, num_blocks: int, wanted_len: int) -> int:
    """Largest length up to `wanted_len` whose blocks number at most `num_blocks`, by bisection."""
    low, high = 0, wanted_len
    while low < high:
        middle = (low + high + 1) // 2
        if num_blocks_of_request(spec, config, middle) <= num_blocks:
            low = middle
        else:
            high = middle - 1
    return low


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
