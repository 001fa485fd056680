"""`RequestEvent`: one timeline for metrics, simulator and dashboard; `EngineStats`: the gauges."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pelton.core.lora import LoraAdapter


class EventKind(StrEnum):
    QUEUED = "queued"
    SCHEDULED = "scheduled"  # first admission, or again after a preemption
    COMPUTED = "computed"  # a chunk of the prompt, or of what a preemption lost
    FIRST_TOKEN = "first_token"
    PREEMPTED = "preempted"
    PINNED = "pinned"  # its KV is kept for the session's next turn
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """`time_s` is on the engine's monotonic clock. `num_tokens` is what the kind counts.

    QUEUED: prompt tokens; `detail` is the tenant. SCHEDULED: tokens found in the prefix cache. COMPUTED:
    tokens of the chunk. PREEMPTED: tokens that will be computed again. PINNED: tokens of context; `detail` is
    for how many seconds. FINISHED: output tokens; `detail` is the finish reason or error code.
    """

    request_id: str  # of the sequence
    kind: EventKind
    time_s: float
    num_tokens: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class TenantStats:
    """One tenant's account. Service is in input tokens: computed prompt tokens, and outputs at twice that."""

    tenant_id: str
    num_running: int
    num_waiting: int
    service: float  # all it got
    virtual_service: float  # by weight, lifted after idling; the spread among the waiting is the fairness gap


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Snapshot after a step. `num_*_total` only grow; the rest are gauges."""

    time_s: float = 0.0
    num_running: int = 0
    num_waiting: int = 0
    num_deferred: int = 0  # of these, waiting for a grammar, for KV from disk or a peer, or for the prompt they share
    num_blocks_total: int = 0
    num_blocks_used: int = 0
    num_blocks_cached: int = 0
    num_prefix_queries_total: int = 0  # prompt tokens looked up, counted at admission only
    num_prefix_hits_total: int = 0  # prompt tokens found
    num_preemptions_total: int = 0
    num_recomputed_tokens_total: int = 0
    num_prompt_tokens_total: int = 0  # prompt tokens of admitted requests
    num_output_tokens_total: int = 0
    num_steps_total: int = 0
    num_step_tokens_total: int = 0  # prompt tokens computed (again after a preemption too), and tokens made
    num_host_blocks: int = 0  # of host memory behind the KV cache, that can be had
    num_host_blocks_cached: int = 0
    num_disk_blocks: int = 0
    num_host_hit_tokens_total: int = 0  # found in host memory, after preemptions too
    num_disk_hit_tokens_total: int = 0  # of these, read from disk for it
    num_tier_stored_blocks_total: int = 0  # device to host memory
    num_tier_loaded_blocks_total: int = 0  # host memory to device
    num_tier_dropped_blocks_total: int = 0  # evicted from the device and not kept: host memory was busy
    num_disk_written_blocks_total: int = 0
    num_disk_read_blocks_total: int = 0
    num_disk_failed_writes_total: int = 0
    num_disk_failed_reads_total: int = 0  # missing, damaged or foreign
    num_peer_received_blocks_total: int = 0  # from other engines
    num_peer_failed_blocks_total: int = 0  # asked for and not had: missing there, damaged, or the engine is gone
    num_peer_dropped_blocks_total: int = 0  # received, but the cache had no room
    num_peer_sent_blocks_total: int = 0  # copied for other engines to read
    schedule_s_total: float = 0.0  # step time split: seconds in schedule()
    execute_s_total: float = 0.0  # seconds in the executor
    postprocess_s_total: float = 0.0  # seconds on results: stops, text, outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """Facts fixed once the engine is ready."""

    max_model_len: int  # after fitting to the KV cache
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_waiting: int
    dtype: str
    vocab_size: int
    device: str
    kernels: str
    num_threads: int
    enable_prefix_caching: bool
    load_s: float = 0.0
    num_host_blocks: int = 0  # of host memory behind the KV cache, the null block included; 0: none
    kv_block_bytes: int = 0
    kv_identity: str = ""  # of all that KV depends on but its tokens
    hidden_size: int = 0  # values of an embedding
    lora_modules: tuple[tuple[str, LoraAdapter], ...] = ()  # adapters loaded at the start, by name
    max_loras: int = 0
