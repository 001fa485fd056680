"""transformers' own continuous batching on the same shape of model, for a number beside Pelton's."""

from __future__ import annotations

import time
from typing import Any

import torch
from benchmarks.gpu.engine_items import preset
from benchmarks.gpu.running_engine import make_prompts


def continuous_batching(num_requests: int = 256, num_input: int = 128, num_output: int = 128) -> list[dict[str, Any]]:
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
    settings = GenerationConfig(
        max_new_tokens=num_output, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cuda_graph=True
    )
    model.generate_batch(make_prompts(spec, 32, num_input, 1), generation_config=settings, progress_bar=False)
    start_s = time.perf_counter()
    outputs = model.generate_batch(
        make_prompts(spec, num_requests, num_input, 2), generation_config=settings, progress_bar=False
    )
    time_s = time.perf_counter() - start_s
    num_tokens = sum(len(output.generated_tokens) for output in outputs.values())
    return [
        {
            "requests": num_requests,
            "input": num_input,
            "output": num_output,
            "s": time_s,
            "output_tok_s": num_tokens / time_s,
        }
    ]
