"""What `make gpu-check` asks of the engine: the same text, law 3, and speed beside what the device can do.

Every item takes `tiny`: shapes for the interpreter, whose times mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from benchmarks.gpu.parts import in_parts
from benchmarks.gpu.running_engine import Answer, RunningEngine, make_prompts, num_product_weights

from pelton.core.model_spec import ModelSpec, RopeSpec, make_kv_groups
from pelton.weights.catalog import resolve_model
from pelton.weights.config import ModelConfig
from pelton.weights.model_files import open_model

Rows = list[dict[str, Any]]

# Bytes of a weight, scales of int4 included.
WEIGHT_BYTES = {None: 2.0, "fp8": 1.0, "int4": 0.5 + 2 / 128}
# Output tokens/s of TensorRT-LLM v1.0, Llama 3.1 8B in FP8 on one H100, as published, by (input, output).
PUBLISHED = {(128, 128): 28312.0, (1000, 1000): 15220.0, (2048, 128): 3450.0}
# (input, output, requests), by weights: what an H100 should do in a quarter of a minute each.
WORK = {
    None: ((128, 128, 1024), (2048, 128, 128), (1000, 1000, 128)),
    "fp8": ((128, 128, 1024), (2048, 128, 192), (1000, 1000, 256)),
}
TINY = ModelSpec(
    architecture="llama",
    num_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=256,
    max_model_len=256,
    rms_norm_eps=1e-5,
    rope=RopeSpec(theta=1e4, rotary_dim=16),
    kv_groups=make_kv_groups([None, None]),
)


def preset(name: str, **changes: Any) -> ModelSpec:
    spec = open_model(resolve_model(ModelConfig(model=name, load_format="dummy"))).spec
    return replace(spec, **changes)


def model_of(tiny: bool) -> ModelSpec:
    return TINY if tiny else preset("llama-3.1-8b")


def engine_of(
    spec: ModelSpec,
    tiny: bool,
    quantization: str | None = None,
    worker: dict[str, Any] | None = None,
    **settings: Any,
) -> RunningEngine:
    if tiny:
        # One size of tile: the interpreter multiplies with numpy, which sums up by a matrix's shape.
        settings = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "num_kv_blocks": 128}
        quantization = None
    # Said, not found out: what decides is a file of the driver's, which not every container has.
    worker = {"kernel_backend": "triton", "dtype": "float32" if tiny else "bfloat16", **(worker or {})}
    return RunningEngine(spec, worker, settings, quantization=quantization)


def equal_text_model(tiny: bool) -> ModelSpec:
    if tiny:
        return TINY
    rope = RopeSpec(theta=1e4, rotary_dim=64)
    return replace(TINY, hidden_size=256, intermediate_size=704, head_dim=64, vocab_size=2048, rope=rope)


def same_text(tiny: bool) -> Rows:
    """Greedy tokens of the reference on the CPU and of Triton's kernels, on equal weights in float32."""
    spec = equal_text_model(tiny)
    prompts = [make_prompts(spec, 1, length, length)[0] for length in ((5, 9) if tiny else (3, 17, 64, 130, 200))]
    found: list[list[list[int]]] = []
    for backend in ("reference", "triton"):
        worker = {"kernel_backend": backend, "dtype": "float32", "kv_cache_dtype": "float32", "threads": 2}
        settings = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_kv_blocks": 256}
        with RunningEngine(spec, worker, settings, same_weights=True) as engine:
            found.append([answer.token_ids for answer in engine.generate(prompts, 4 if tiny else 40)])
    if found[0] != found[1]:
        raise AssertionError(f"tokens differ: {found}")
    return [{"requests": len(prompts), "tokens": sum(map(len, found[0])), "different": len(set(map(tuple, found[0])))}]


def batch_invariance(tiny: bool) -> Rows:
    """A request alone, and among others whose prompts are cut beside it: tokens and logprobs, bit for bit."""
    spec = TINY if tiny else preset("llama-3.1-8b", num_layers=4, kv_groups=make_kv_groups([None] * 4))
    num_tokens = 3 if tiny else 64
    own = make_prompts(spec, 1, 7 if tiny else 300, 99)[0]
    lengths = (5, 11) if tiny else tuple(range(10, 1010, 16))
    others = [make_prompts(spec, 1, length, length)[0] for length in lengths]
    settings = {"max_num_seqs": 128, "max_num_batched_tokens": 2048, "num_kv_blocks": 8192}
    with engine_of(spec, tiny, **settings) as engine:
        alone = engine.generate([own], num_tokens, logprobs=0)[0]
        among = engine.generate([*others, own], num_tokens, logprobs=0)[-1]
        plain = engine.generate([*others, own], num_tokens)[-1]
    assert alone.token_ids == among.token_ids == plain.token_ids, "tokens differ"
    assert alone.logprobs == among.logprobs, "logprobs differ"
    return [{"others": len(others), "tokens": num_tokens}]


def single_stream(tiny: bool, begun_s: float) -> Iterator[dict[str, Any]]:
    """Decode of one request: milliseconds a token, and the weights' bytes over that beside the measured copy.

    `begun_s`: when this process began; what it measured before it had an engine does not count.
    """
    from benchmarks.gpu.products import measure_copy

    start_s = time.perf_counter()
    copy_gb_s = None if tiny else measure_copy(torch.device("cuda"))
    begun_s += time.perf_counter() - start_s
    kinds = ((None, begun_s), ("fp8", None), ("int4", None))
    return in_parts((str(kind), partial(_single_stream, tiny, kind, copy_gb_s, since_s)) for kind, since_s in kinds)


def _single_stream(
    tiny: bool, quantization: str | None, copy_gb_s: float | None, begun_s: float | None
) -> Iterator[dict[str, Any]]:
    spec = model_of(tiny)
    with engine_of(spec, tiny, quantization, max_num_seqs=4, max_num_batched_tokens=512, max_model_len=4096) as engine:
        prompt = make_prompts(spec, 1, 16)
        engine.generate(prompt, 1)
        first_token_s = None if begun_s is None else time.perf_counter() - begun_s
        engine.generate(prompt, 2 if tiny else 64)
        token_s = _token_s(engine.generate(prompt, 3 if tiny else 256)[0])
        gb_s = num_product_weights(spec) * WEIGHT_BYTES[quantization] / token_s / 1e9
        yield {
            "weights": quantization or engine.info.dtype,
            "ms": 1e3 * token_s,
            "gb_s": gb_s,
            "copy_gb_s": copy_gb_s,
            "share": copy_gb_s and gb_s / copy_gb_s,
            "load_s": engine.load_s,
            "first_token_s": first_token_s,  # from the start of the process
        }


def prefill(tiny: bool) -> Rows:
    """A prompt of 8,192 tokens to its first token: operations over that beside the measured bf16 product."""
    spec, length = model_of(tiny), 20 if tiny else 8192
    tflop_s = None if tiny else measure_product()
    with engine_of(spec, tiny, max_num_seqs=4, max_num_batched_tokens=8192, max_model_len=16384) as engine:
        times_s = []
        for prompt in make_prompts(spec, 2 if tiny else 6, length):
            start_s = time.perf_counter()
            answer = engine.generate([prompt], 1)[0]
            times_s.append(answer.times_s[0] - start_s)
    time_s = statistics.median(times_s[1:])
    head = spec.vocab_size * spec.hidden_size
    operations = 2 * (num_product_weights(spec) - head) * length + 2 * head
    operations += spec.num_layers * 2 * spec.num_heads * spec.head_dim * length * (length + 1)
    rate = operations / time_s / 1e12
    return [
        {
            "tokens": length,
            "ms": 1e3 * time_s,
            "tflop_s": rate,
            "product_tflop_s": tflop_s,
            "share": tflop_s and rate / tflop_s,
        }
    ]


def throughput(tiny: bool, quantization: str | None) -> Iterator[dict[str, Any]]:
    """Offline, of one engine and all three lengths: all requests at once, output tokens a second of the whole run.

    In steps as large as the cache allows: as many requests as are held without a preemption. With fp8 weights the
    cache is fp8, too, as that of the published figures; then a profile of each length says where the rest goes.
    """
    spec = model_of(tiny)
    kv_format = {} if quantization is None else {"kv_cache_dtype": quantization}
    with engine_of(
        spec, tiny, quantization, kv_format, max_num_seqs=512, max_num_batched_tokens=8192, max_model_len=4096
    ) as engine:
        work = ((6, 3, 4),) if tiny else WORK[quantization]
        yield from in_parts((str(lengths), partial(_throughput, engine, quantization, *lengths)) for lengths in work)
        if quantization == "fp8" and not tiny:
            yield from in_parts((f"profile {lengths}", partial(_profile_of, engine, *lengths)) for lengths in work)


def _throughput(
    engine: RunningEngine, quantization: str | None, num_input: int, num_output: int, num_requests: int
) -> Iterator[dict[str, Any]]:
    # Compiles, and captures the steps of a full batch.
    engine.generate(make_prompts(engine.spec, min(num_requests, 512), num_input, 1), min(num_output, 4))
    start_s = time.perf_counter()
    answers = engine.generate(make_prompts(engine.spec, num_requests, num_input, 2), num_output)
    time_s = max(answer.times_s[-1] for answer in answers) - start_s
    rate = num_requests * num_output / time_s
    published = PUBLISHED.get((num_input, num_output)) if quantization == "fp8" else None
    yield {
        "weights": quantization or engine.info.dtype,
        "input": num_input,
        "output": num_output,
        "requests": num_requests,
        "s": time_s,
        "output_tok_s": rate,
        "published_tok_s": published,
        "share": published and rate / published,
    }


def _profile_of(engine: RunningEngine, num_input: int, num_output: int, num_requests: int) -> Iterator[dict[str, Any]]:
    """Prompts and some decodes of half the requests, from the first step to the last."""
    prompts = make_prompts(engine.spec, num_requests // 2, num_input, 3)
    for row in _profile(engine, prompts, min(num_output, 64), (0.05, 0.95)):
        yield {"profile": f"{num_input}/{num_output}", **row}


def busy(tiny: bool) -> Iterator[dict[str, Any]]:
    """Steady decode at batch 256: the part of the time that the device works, and on what."""
    spec, batch = model_of(tiny), 4 if tiny else 256
    with engine_of(spec, tiny, max_num_seqs=256, max_num_batched_tokens=8192, max_model_len=2048) as engine:
        prompts = make_prompts(spec, batch, 8 if tiny else 256)
        engine.generate(prompts, 2 if tiny else 64)
        yield {"tpot_ms": 1e3 * _token_s(engine.generate(prompts, 4 if tiny else 64)[0])}
        if tiny:
            return
        # The middle of the run: every request decodes.
        yield from in_parts([("profile", partial(_profile, engine, prompts, 96, (0.5, 0.9)))])


def _profile(
    engine: RunningEngine, prompts: list[list[int]], num_tokens: int, part: tuple[float, float]
) -> Iterator[dict[str, Any]]:
    """Of a `part` of the time: how much of it the device works, and on what."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        answers = engine.generate(prompts, num_tokens)
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    if not spans:
        raise RuntimeError("the profiler saw nothing on the device: may this process read its counters?")
    start, end = spans[0][0], max(span[1] for span in spans)
    low, high = (start + share * (end - start) for share in part)
    working, reached, by_name = 0.0, low, dict[str, float]()
    for first, last, name in spans:
        first, last = max(first, low), min(last, high)
        if last > first:
            by_name[name] = by_name.get(name, 0.0) + last - first
            working += max(0.0, last - max(first, reached))
            reached = max(reached, last)
    top = sorted(by_name.items(), key=lambda item: -item[1])[:12]
    yield {
        "batch": len(prompts),
        "busy": working / (high - low),
        "profiled_tpot_ms": 1e3 * _token_s(answers[0]),
        "kernels": {name[:60]: round(part / (high - low), 4) for name, part in top},
    }


def measure_product() -> float:
    """TFLOP/s of torch's own 8192 x 8192 x 8192 product in bf16, on random numbers."""
    import triton.testing

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / triton.testing.do_bench(lambda: a @ b.T, return_mode="median") / 1e9


def _token_s(answer: Answer) -> float:
    gaps = [later - earlier for earlier, later in zip(answer.times_s, answer.times_s[1:], strict=False)]
    return statistics.fmean(gaps[len(gaps) // 4 :])


def summary(rows: Sequence[dict[str, Any]]) -> str:
    return "; ".join(
        f"{row['part']}: {row['failed'].strip().splitlines()[-1]}"
        if "failed" in row
        else ", ".join(f"{name} {_shown(value)}" for name, value in row.items() if value is not None)
        for row in rows
    )


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
