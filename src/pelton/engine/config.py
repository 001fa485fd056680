"""Settings of the control plane."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pelton.core.config import setting
from pelton.core.errors import ConfigError
from pelton.core.step_size import CPU_STEP, StepSize
from pelton.core.tenant import parse_tenants

POLICY_NAMES = ("agent", "fair", "dlpm", "program", "priority", "fcfs")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    max_model_len: int | None = setting(None, "longest prompt plus output, in tokens; default: the model's own")
    max_num_seqs: int | None = setting(None, "most requests in one step; default: 64 on a CPU, 256 on a GPU")
    max_num_batched_tokens: int | None = setting(
        None, "token budget of one step; a smaller one smooths decoding; default: 256 on a CPU, 8192 on a GPU"
    )
    tpot_slo_ms: float | None = setting(
        None, "time between tokens to keep while prompts are computed: the token budget follows measured step times"
    )
    long_prefill_chunk: int | None = setting(None, "most tokens of one request in a step; default: the whole budget")
    block_size: int = setting(16, "tokens in a KV block")
    kv_cache_memory_gb: float | None = setting(
        None,
        "memory for KV blocks of each rank, in GiB; default: a quarter of what is free, at most 4 in all; on a GPU "
        "all but what steps take",
    )
    num_kv_blocks: int | None = setting(None, "number of KV blocks, instead of --kv-cache-memory-gb")
    host_kv_cache_gb: float | None = setting(
        None,
        "host memory for KV blocks that leave the cache of each rank, in GiB, taken as it is used; 0: none; default: "
        "as much as the cache has, at most an eighth of what is free; with a GPU pinned at once, at most 4 in all",
    )
    disk_kv_cache_dir: str | None = setting(
        None, "folder for KV blocks that outlive the process; its blocks are readable to this user only"
    )
    disk_kv_cache_gb: float = setting(16.0, "most GiB of KV blocks in that folder; the least recently used go first")
    kv_eviction_policy: str = setting(
        "lru", "which cached KV block is given up first, on the device and in host memory", choices=("lru", "value")
    )
    enable_prefix_caching: bool = setting(True, "keep KV of finished requests for prompts that start alike")
    scheduling_policy: str = setting("agent", "order of the waiting and choice of victims", choices=POLICY_NAMES)
    tenants: tuple[str, ...] = setting(
        (),
        "weight and caps of a tenant, as NAME:weight=2,max_num_running=8; the name * is for all others",
        alias="--tenant",
    )
    kv_charge: float = setting(
        0.0, "what a tenant is charged for one KV block held for one second, in input tokens; 0: nothing"
    )
    max_num_waiting: int = setting(1024, "requests that may queue; more are refused with 503 and Retry-After")
    enable_overlap: bool = setting(True, "prepare the next step while one runs")
    step_log: str | None = setting(None, "file that gets every step's shape and time, for `pelton simulate calibrate`")

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ConfigError(f"block_size is {self.block_size}; it must be at least 1")
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "long_prefill_chunk", "num_kv_blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        parse_tenants(self.tenants)
        if self.max_num_waiting < 0:
            raise ConfigError(f"max_num_waiting is {self.max_num_waiting}; it must be at least 0")
        if not self.kv_charge >= 0:
            raise ConfigError(f"kv_charge is {self.kv_charge}; it must be at least 0")
        if self.tpot_slo_ms is not None and not self.tpot_slo_ms > 0:
            raise ConfigError(f"tpot_slo_ms is {self.tpot_slo_ms}; it must be positive")
        if self.kv_cache_memory_gb is not None and self.kv_cache_memory_gb <= 0:
            raise ConfigError(f"kv_cache_memory_gb is {self.kv_cache_memory_gb}; it must be positive")
        if self.disk_kv_cache_gb <= 0:
            raise ConfigError(f"disk_kv_cache_gb is {self.disk_kv_cache_gb}; it must be positive")
        if self.disk_kv_cache_dir is not None and self.host_kv_cache_gb == 0:
            raise ConfigError(
                "disk_kv_cache_dir needs host memory to move blocks through: host_kv_cache_gb must not be 0"
            )
        if self.host_kv_cache_gb is not None and self.host_kv_cache_gb < 0:
            raise ConfigError(f"host_kv_cache_gb is {self.host_kv_cache_gb}; it must be at least 0")
        if (self.max_num_batched_tokens or math.inf) < (self.max_num_seqs or 0):
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is smaller than max_num_seqs "
                f"({self.max_num_seqs}): a step could not hold one token of every running request"
            )

    def step_size(self, default: StepSize = CPU_STEP) -> StepSize:
        """Of one step: what is set, else what the device wants, which yields to the other one that is set."""
        num_requests = self.max_num_seqs or min(default.num_requests, self.max_num_batched_tokens or math.inf)
        num_tokens = self.max_num_batched_tokens or max(default.num_tokens, self.max_num_seqs or 0)
        return StepSize(int(num_requests), num_tokens)

    def sized_for(self, default: StepSize) -> EngineConfig:
        """With nothing of a step's size left open."""
        size = self.step_size(default)
        return replace(self, max_num_seqs=size.num_requests, max_num_batched_tokens=size.num_tokens)
