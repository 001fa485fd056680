"""Prometheus metrics, fed by the engine's events and stats; names are vLLM's where it has one.

Every `/metrics` name that dashboards key on is listed in docs; ours start with `pelton:`. Labels have
few values: tenants beyond the first `MAX_TENANTS` are counted together as `other`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import generate_latest

from pelton.core.errors import QueueFullError
from pelton.core.events import EngineInfo, EngineStats, EventKind, RequestEvent
from pelton.core.sampling_params import SamplingParams
from pelton.core.session import TenancyStats
from pelton.engine.wire import EngineUpdate
from pelton.serving.histogram import BucketCounts
from pelton.serving.tenancy_metrics import TenancyMetrics

MAX_TENANTS = 100
OTHER_TENANT = "other"
_LABELS = ("model_name", "engine")
_CACHE_LABELS = (
    "block_size",
    "num_gpu_blocks",
    "enable_prefix_caching",
    "cache_dtype",
    "kv_cache_size_tokens",
    "kv_cache_max_concurrency",
)
_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST_BUCKETS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_LENGTH_BUCKETS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_N_BUCKETS = (1, 2, 5, 10, 20)
_PREEMPTION_BUCKETS = (1, 2, 3, 4, 5, 10, 20)
_STEP_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
# Counters that copy a total of the engine: metric name without `_total` -> (field of EngineStats, help).
_COUNTERS = {
    "vllm:prefix_cache_queries": ("num_prefix_queries_total", "Prompt tokens looked up in the prefix cache"),
    "vllm:prefix_cache_hits": ("num_prefix_hits_total", "Prompt tokens found in the prefix cache"),
    "vllm:num_preemptions": ("num_preemptions_total", "Preemptions"),
    "vllm:prompt_tokens": ("num_prompt_tokens_total", "Prompt tokens of admitted requests"),
    "vllm:generation_tokens": ("num_output_tokens_total", "Generated tokens"),
    "pelton:recomputed_tokens": ("num_recomputed_tokens_total", "Tokens computed again after a preemption"),
    "pelton:kv_host_hit_tokens": ("num_host_hit_tokens_total", "Tokens whose KV came from host memory"),
    "pelton:kv_disk_hit_tokens": ("num_disk_hit_tokens_total", "Of these, tokens whose KV was read from disk"),
    "pelton:kv_host_stored_blocks": ("num_tier_stored_blocks_total", "KV blocks copied to host memory"),
    "pelton:kv_host_loaded_blocks": ("num_tier_loaded_blocks_total", "KV blocks copied from host memory"),
    "pelton:kv_host_dropped_blocks": ("num_tier_dropped_blocks_total", "KV blocks given up: host memory was busy"),
    "pelton:kv_disk_written_blocks": ("num_disk_written_blocks_total", "KV blocks written to disk"),
    "pelton:kv_disk_read_blocks": ("num_disk_read_blocks_total", "KV blocks read from disk"),
    "pelton:kv_disk_failed_writes": ("num_disk_failed_writes_total", "KV blocks that could not be written"),
    "pelton:kv_disk_failed_reads": ("num_disk_failed_reads_total", "KV blocks missing, damaged or foreign"),
    "pelton:kv_peer_received_blocks": ("num_peer_received_blocks_total", "KV blocks from other engines"),
    "pelton:kv_peer_failed_blocks": ("num_peer_failed_blocks_total", "KV blocks that other engines did not give"),
    "pelton:kv_peer_dropped_blocks": ("num_peer_dropped_blocks_total", "KV blocks received without room for them"),
    "pelton:kv_peer_sent_blocks": ("num_peer_sent_blocks_total", "KV blocks copied for other engines"),
    "pelton:steps": ("num_steps_total", "Engine steps"),
    "pelton:step_schedule_seconds": ("schedule_s_total", "Time in the scheduler"),
    "pelton:step_execute_seconds": ("execute_s_total", "Time in the executor"),
    "pelton:step_postprocess_seconds": ("postprocess_s_total", "Time on results: stops, text, outputs"),
}
_REQUEST_HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": ("From arrival at the engine to the first token", _TTFT_BUCKETS),
    "vllm:inter_token_latency_seconds": ("Between tokens of a sequence, as they leave for the client", _ITL_BUCKETS),
    "vllm:e2e_request_latency_seconds": ("From arrival at the engine to the end", _REQUEST_BUCKETS),
    "vllm:request_queue_time_seconds": ("From arrival to first admission", _REQUEST_BUCKETS),
    "vllm:request_inference_time_seconds": ("From first admission to the end", _REQUEST_BUCKETS),
    "vllm:request_prefill_time_seconds": ("From first admission to the first token", _REQUEST_BUCKETS),
    "vllm:request_decode_time_seconds": ("From the first token to the end", _REQUEST_BUCKETS),
    "vllm:request_prompt_tokens": ("Prompt tokens of a sequence", _LENGTH_BUCKETS),
    "vllm:request_generation_tokens": ("Generated tokens of a sequence", _LENGTH_BUCKETS),
    "vllm:request_num_preemptions": ("How often a sequence was preempted", _PREEMPTION_BUCKETS),
    "vllm:request_params_n": ("The parameter n of a prompt", _N_BUCKETS),
    "vllm:request_params_max_tokens": ("The parameter max_tokens of a prompt, where it has one", _LENGTH_BUCKETS),
    "vllm:iteration_tokens_total": ("Prompt tokens computed and tokens made in a step", _STEP_BUCKETS),
}
# Detail of a FINISHED event -> value of `finished_reason`; anything else is an error.
_FINISHED_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "request_cancelled": "abort"}


@dataclass(slots=True)
class _Timeline:
    queued_s: float
    num_prompt_tokens: int
    tenant: str
    scheduled_s: float | None = None
    first_token_s: float | None = None
    num_preemptions: int = 0


class ServerMetrics:
    """Its own registry, so that several servers of one process do not mix. Used on the event loop."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._label_values = (model_name, "0")
        self._timelines: dict[str, _Timeline] = {}
        self._tenants: set[str] = set()
        self._stats = EngineStats()
        self._published = EngineStats()  # what of it the counters hold
        self._running = self._gauge("vllm:num_requests_running", "Requests in the running batch")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait for admission")
        self._waiting_by_reason = Gauge(
            "vllm:num_requests_waiting_by_reason",
            "Requests that wait for room (capacity), or for something else (deferred)",
            (*_LABELS, "reason"),
            registry=self.registry,
        )
        self._kv_usage = self._gauge("vllm:kv_cache_usage_perc", "Part of the KV blocks in use, 0 to 1")
        self._kv_cached = self._gauge("pelton:kv_cache_cached_blocks", "Unused KV blocks that hold a prefix")
        self._counters = {field: self._counter(name, text) for name, (field, text) in _COUNTERS.items()}
        self.labels = labels = dict(zip(_LABELS, self._label_values, strict=True))
        self._histograms = {
            name: BucketCounts(name, text, labels, buckets) for name, (text, buckets) in _REQUEST_HISTOGRAMS.items()
        }
        for histogram in self._histograms.values():
            self.registry.register(histogram)
        # (seconds, num_tokens): so many tokens of a sequence came together, that long after the one before.
        self.observe_gap = self._histograms["vllm:inter_token_latency_seconds"].observe_parts
        self._step_tokens = self._histograms["vllm:iteration_tokens_total"]
        self._success = Counter(
            "vllm:request_success", "Ended sequences", (*_LABELS, "finished_reason"), registry=self.registry
        )
        self._cache_config = Gauge(
            "vllm:cache_config_info",
            "The KV cache's settings",
            (*_LABELS, *_CACHE_LABELS),
            registry=self.registry,
        )
        # vLLM's, of its bounded queue; ours counts all that is refused.
        self._queue_rejections = Counter(
            "vllm:admission_rejections",
            "Requests refused because the queue is full",
            ("model_name", "reason"),
            registry=self.registry,
        ).labels(model_name, "max_num_queued_reqs")
        self._rejections = Counter(
            "pelton:admission_rejections", "Requests refused", (*_LABELS, "reason"), registry=self.registry
        )
        self._http = Counter("pelton:http_responses", "HTTP responses", ("path", "status"), registry=self.registry)
        self._tenant_tokens = Counter(
            "pelton:tenant_tokens", "Tokens by tenant", (*_LABELS, "tenant", "kind"), registry=self.registry
        )

        self.tenancy = TenancyMetrics(labels, self._tenant)
        self.registry.register(self.tenancy)

    def expose(self) -> bytes:
        """The text format of Prometheus."""
        self._publish_stats()
        return generate_latest(self.registry)

    def set_info(self, info: EngineInfo) -> None:
        self._cache_config.clear()
        num_tokens = info.num_blocks * info.block_size
        concurrency = round(num_tokens / info.max_model_len, 2)
        settings = (info.block_size, info.num_blocks, info.enable_prefix_caching, info.dtype, num_tokens, concurrency)
        self._cache_config.labels(*self._label_values, *settings).set(1)

    def clear_gauges(self) -> None:
        """There is no engine at the moment, so nothing runs or waits."""
        self.tenancy.stats = TenancyStats()
        self._stats = replace(
            self._stats, num_running=0, num_waiting=0, num_deferred=0, num_blocks_used=0, num_blocks_cached=0
        )

    def take_update(self, update: EngineUpdate) -> None:
        """Listener of `EngineClient`."""
        num_steps, num_tokens = self._stats.num_steps_total, self._stats.num_step_tokens_total
        if update.stats.num_steps_total < num_steps:
            self._forget_lost()
            # A new engine counts from zero; the counters go on.
            self._publish_stats()
            self._published = EngineStats()
            num_steps = num_tokens = 0
        for event in update.events:
            self._take_event(event)
        if update.stats.num_steps_total > num_steps:
            num_new = update.stats.num_steps_total - num_steps
            self._step_tokens.observe_parts(update.stats.num_step_tokens_total - num_tokens, num_new)
        self._stats = update.stats

    def count_rejection(self, reason: str) -> None:
        """`reason` is the code of a typed error, of which there are few."""
        self._rejections.labels(*self._label_values, reason).inc()
        if reason == QueueFullError.code:
            self._queue_rejections.inc()

    def observe_parameters(self, sampling: SamplingParams) -> None:
        """Of a prompt that the engine took."""
        if sampling.pooling is not None:
            return
        self._histograms["vllm:request_params_n"].observe(sampling.n)
        if sampling.max_tokens is not None:
            self._histograms["vllm:request_params_max_tokens"].observe(sampling.max_tokens)

    def count_response(self, path: str, status: int) -> None:
        """`path` is that of a route."""
        self._http.labels(path, status).inc()

    def _forget_lost(self) -> None:
        """The engine died with these; a new one has taken its place."""
        if self._timelines:
            self._success.labels(*self._label_values, "error").inc(len(self._timelines))
            self._timelines.clear()

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, _LABELS, registry=self.registry).labels(*self._label_values)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, _LABELS, registry=self.registry).labels(*self._label_values)

    def _publish_stats(self) -> None:
        """When somebody looks: updates come with every step, and locks and labels cost more than the rest of one."""
        stats, published = self._stats, self._published
        for field, counter in self._counters.items():
            counter.inc(max(0, getattr(stats, field) - getattr(published, field)))
        self._published = stats
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._waiting_by_reason.labels(*self._label_values, "capacity").set(stats.num_waiting - stats.num_deferred)
        self._waiting_by_reason.labels(*self._label_values, "deferred").set(stats.num_deferred)
        self._kv_usage.set(stats.num_blocks_used / stats.num_blocks_total if stats.num_blocks_total else 0.0)
        self._kv_cached.set(stats.num_blocks_cached)

    def _take_event(self, event: RequestEvent) -> None:
        if event.kind is EventKind.QUEUED:
            timeline = _Timeline(event.time_s, event.num_tokens, self._tenant(event.detail))
            self._timelines[event.request_id] = timeline
            return
        known = self._timelines.get(event.request_id)
        if known is None:
            return
        if event.kind is EventKind.SCHEDULED and known.scheduled_s is None:
            known.scheduled_s = event.time_s
            self._histograms["vllm:request_queue_time_seconds"].observe(event.time_s - known.queued_s)
            self._tenant_tokens.labels(*self._label_values, known.tenant, "prompt").inc(known.num_prompt_tokens)
        elif event.kind is EventKind.FIRST_TOKEN and known.first_token_s is None:
            known.first_token_s = event.time_s
            self._histograms["vllm:time_to_first_token_seconds"].observe(event.time_s - known.queued_s)
            if known.scheduled_s is not None:
                prefill_s = event.time_s - known.scheduled_s
                self._histograms["vllm:request_prefill_time_seconds"].observe(prefill_s)
        elif event.kind is EventKind.PREEMPTED:
            known.num_preemptions += 1
        elif event.kind is EventKind.FINISHED:
            del self._timelines[event.request_id]
            self._finish(known, event)

    def _finish(self, known: _Timeline, event: RequestEvent) -> None:
        reason = _FINISHED_REASONS.get(event.detail, "error")
        self._success.labels(*self._label_values, reason).inc()
        self._tenant_tokens.labels(*self._label_values, known.tenant, "generation").inc(event.num_tokens)
        histograms = self._histograms
        histograms["vllm:e2e_request_latency_seconds"].observe(event.time_s - known.queued_s)
        histograms["vllm:request_prompt_tokens"].observe(known.num_prompt_tokens)
        histograms["vllm:request_generation_tokens"].observe(event.num_tokens)
        histograms["vllm:request_num_preemptions"].observe(known.num_preemptions)
        if known.scheduled_s is not None:
            histograms["vllm:request_inference_time_seconds"].observe(event.time_s - known.scheduled_s)
        if known.first_token_s is not None:
            histograms["vllm:request_decode_time_seconds"].observe(event.time_s - known.first_token_s)

    def _tenant(self, tenant_id: str) -> str:
        if tenant_id in self._tenants:
            return tenant_id
        if len(self._tenants) >= MAX_TENANTS:
            return OTHER_TENANT
        self._tenants.add(tenant_id)
        return tenant_id
