"""transformers' own continuous batching on the same shape of model, for a number beside Pelton's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from benchmarks.gpu.engine_items import preset
from benchmarks.gpu.running_engine import make_prompts

# (input, output, requests): fewer than Pelton is given, since each takes longer.
WORK = ((128, 128, 256), (2048, 128, 96), (1000, 1000, 64))


def continuous_batching() -> Iterator[dict[str, Any]]:
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    spec = preset("llama-3.1-8b")
    config = LlamaConfig(
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        vocab_size=spec.vocab_size,
        max_position_embeddings=4096,
        rms_norm_eps=spec.rms_norm_eps,
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    model.set_attn_implementation("sdpa")
    for num_input, num_output, num_requests in WORK:
        settings = GenerationConfig(max_new_tokens=num_output, do_sample=False, eos_token_id=-1, pad_token_id=0)
        start_s = time.perf_counter()
        outputs = model.generate_batch(
            make_prompts(spec, num_requests, num_input, 2), generation_config=settings, progress_bar=False
        ).values()
        end_s = time.perf_counter()
        # It warms up within the call; its clock starts where its requests do, if it tells.
        time_s = end_s - min((getattr(output, "created_time", start_s) for output in outputs), default=start_s)
        num_tokens = sum(len(output.generated_tokens) for output in outputs)
        if num_tokens != num_requests * num_output:
            raise RuntimeError(f"{num_tokens} tokens came of {num_requests} x {num_output}")
        yield {
            "requests": num_requests,
            "input": num_input,
            "output": num_output,
            "s": time_s,
            "call_s": end_s - start_s,
            "output_tok_s": num_tokens / time_s,
        }
