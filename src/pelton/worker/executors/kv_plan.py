"""How many KV blocks a worker has, and how long a request may be with them: from sizes alone, no step is run."""

from __future__ import annotations

from dataclasses import dataclass

from pelton.core.errors import ConfigError
from pelton.core.model_spec import ModelSpec
from pelton.engine.config import EngineConfig
from pelton.worker.executors.host_resources import num_available_memory_bytes
from pelton.worker.kernels.ops import DTYPE_BYTES, Kernels
from pelton.worker.kv_format import KVFormat
from pelton.worker.parallel import Ranks

_GIB = 2**30
_MAX_DEFAULT_BYTES = 4 * _GIB
_DEVICE_RESERVE_BYTES = 2 * _GIB


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


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Bytes that one rank may take."""

    num_host_bytes: int
    num_device_bytes: int | None  # None: the host is the device
    num_ranks: int = 1  # that share the host

    @property
    def num_bytes(self) -> int:
        return self.num_host_bytes if self.num_device_bytes is None else self.num_device_bytes


def find_free_memory(kernels: Kernels, ranks: Ranks | None) -> FreeMemory:
    """Of the host an even share for each of its ranks. All look at the same time: once all have taken what they take
    before, and before any takes more."""
    promised = kernels.num_promised_bytes()
    if ranks is None:
        return FreeMemory(max(0, num_available_memory_bytes() - promised), kernels.num_free_bytes())
    ranks.least((0,))
    num_host_bytes = max(0, num_available_memory_bytes() // ranks.size - promised)
    num_device_bytes = kernels.num_free_bytes()
    (num_host_bytes,) = ranks.least((num_host_bytes,))
    return FreeMemory(num_host_bytes, num_device_bytes, ranks.size)


def plan_on(spec: ModelSpec, config: EngineConfig, kv_format: KVFormat, kernels: Kernels, free: FreeMemory) -> KVPlan:
    if free.num_device_bytes is None:
        return plan_kv_cache(spec, config, kv_format, free.num_host_bytes, num_ranks=free.num_ranks)
    num_step_bytes = step_bytes(spec, config, DTYPE_BYTES[kernels.dtype], kernels.max_logits_rows)
    num_bytes = max(0, free.num_device_bytes - num_step_bytes)
    return plan_kv_cache(spec, config, kv_format, num_bytes, free.num_host_bytes, num_ranks=free.num_ranks)


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
    *,
    num_ranks: int = 1,
) -> KVPlan:
    """Size the pool and fit `max_model_len` to it.

    `num_available_bytes` is what is free once the weights are loaded; of a device that has `num_host_bytes` of host
    memory beside it, else of the host itself, whose memory is shared by `num_ranks`. Raises
    `ConfigError` where the pool asked for exceeds it, or cannot hold a request worth serving.
    """
    block_bytes = kv_format.block_bytes(spec, config.block_size)
    wanted_len, most_default = wanted_model_len(spec, config), _MAX_DEFAULT_BYTES // num_ranks
    num_useful = 1 + config.step_size().num_requests * num_blocks_of_request(spec, config, wanted_len)
    if config.num_kv_blocks is not None:
        num_blocks = config.num_kv_blocks
    elif config.kv_cache_memory_gb is not None:
        num_blocks = int(config.kv_cache_memory_gb * _GIB) // block_bytes
    else:
        num_default_bytes = num_available_bytes  # of a device: nobody else wants it
        if num_host_bytes is None:
            num_default_bytes = min(num_available_bytes // 4, most_default)
        num_blocks = min(num_default_bytes // block_bytes, num_useful)
    if num_blocks * block_bytes > num_available_bytes:
        raise ConfigError(
            f"{num_blocks} KV blocks take {gib(num_blocks * block_bytes)}, but {gib(num_available_bytes)} are free "
            f"beside the weights: ask for at most {num_available_bytes // block_bytes} (num_kv_blocks) or "
            f"{gib(num_available_bytes)} (kv_cache_memory_gb)"
        )
    # A pool that cannot hold two blocks' worth of tokens would refuse almost every request.
    least_len = min(wanted_len, 2 * config.block_size)
    num_least = 1 + num_blocks_of_request(spec, config, least_len)
    if num_blocks < num_least:
        num_full = 1 + num_blocks_of_request(spec, config, wanted_len)
        raise ConfigError(
            f"the KV cache holds {num_blocks} blocks, too few to serve anything: at least {num_least} are needed, and "
            f"{num_full} ({gib(num_full * block_bytes)}) for one request of {wanted_len} tokens; raise "
            "num_kv_blocks or kv_cache_memory_gb"
        )
    if num_host_bytes is None:
        num_host_bytes, num_default = num_available_bytes - num_blocks * block_bytes, num_available_bytes // 8
    else:
        num_default = min(num_host_bytes // 8, most_default)  # pinned at once: taken, and slowly
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
            f"host_kv_cache_gb is {config.host_kv_cache_gb}, but {gib(num_free)} are free beside the weights and the "
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


def gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
