"""Flags that vLLM users type and Pelton does not have: each is refused with what to do instead."""

from __future__ import annotations

_NOT_YET = "Pelton does not have this yet"

# By vLLM's name; the short forms are in `_SHORT`.
_MISSING: dict[str, str] = {
    "gpu_memory_utilization": f"{_NOT_YET}; --kv-cache-memory-gb sets the memory for KV blocks",
    "pipeline_parallel_size": f"{_NOT_YET}; it runs on one device",
    "data_parallel_size": f"{_NOT_YET}; it runs on one device",
    "distributed_executor_backend": f"{_NOT_YET}; it runs on one device",
    "guided_decoding_backend": "there is one: llguidance",
    "structured_outputs_config": "there is nothing to set: grammars are checked and masked by llguidance",
    "speculative_config": _NOT_YET,
    "kv_transfer_config": "its parts are --kv-connector, --kv-listen and --kv-peers here",
    "kv_events_config": _NOT_YET,
    "enable_lora": "adapters need no switch: --lora-modules NAME=PATH loads them",
    "max_cpu_loras": "its name here is --max-loras: adapters in memory, any number of which may share a step",
    "cpu_offload_gb": f"{_NOT_YET}; --host-kv-cache-gb is memory for KV blocks",
    "swap_space": "its name here is --host-kv-cache-gb",
    "limit_mm_per_prompt": _NOT_YET,
    "otlp_traces_endpoint": _NOT_YET,
    "generation_config": f"{_NOT_YET}; the model's own defaults are used",
    "hf_overrides": _NOT_YET,
    "rope_scaling": f"{_NOT_YET}; the model's own is used",
    "seed": "a seed belongs to a request (`seed` in its body), not to the server",
    "num_gpu_blocks_override": "its name here is --num-kv-blocks",
    "long_prefill_token_threshold": "its name here is --long-prefill-chunk",
    "async_scheduling": "its name here is --enable-overlap",
    "download_dir": "its name here is --cache-dir",
    "uvicorn_log_level": "its name here is --log-level",
    "enable_chunked_prefill": "prefill is always chunked here; --max-num-batched-tokens sets the budget of a step",
    "enforce_eager": "there is nothing to turn off: Pelton captures no graphs",
    "trust_remote_code": "Pelton never runs code that comes with a model",
    "tokenizer_mode": "there is one tokenizer; --tokenizer chooses its file",
    "disable_log_requests": "--log-level warning leaves them out",
    "disable_log_stats": "figures are at /metrics and not logged",
    "max_logprobs": "the limit is fixed at 20",
}
_SHORT = {"pp": "pipeline_parallel_size", "dp": "data_parallel_size"}


def missing_flag_hint(name: str) -> str | None:
    """What to say to `name` (a flag, key or variable; dashes and a leading `no-` do not matter); None: not vLLM's."""
    name = name.lstrip("-").split("=", 1)[0].replace("-", "_").lower()
    name = _SHORT.get(name, name)
    return _MISSING.get(name) or _MISSING.get(name.removeprefix("no_"))
