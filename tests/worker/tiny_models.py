"""Tiny random models of every architecture, made by `transformers`, and steps over paged requests."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from pelton.core.model_spec import ModelSpec
from pelton.worker.forward_batch import ForwardBatch, GroupBatch
from pelton.worker.kernels.ops import Program, make_kernels
from pelton.worker.kv_storage import KVStorage
from pelton.worker.layers.rotary import Rotation, rotary_tables
from pelton.worker.models.registry import Model, compile_model

VOCAB_SIZE = 211
REFERENCE = make_kernels("reference")
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_GEMMA2 = {"num_hidden_layers": 4, "query_pre_attn_scalar": 24, "sliding_window": 24, "head_dim": 16}
_GEMMA3 = {
    "num_hidden_layers": 6,
    "query_pre_attn_scalar": 24,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "head_dim": 16,
}

_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}

# Row name -> model type and what differs from `_SIZES`. Between them: query heads per key-value head
# 1, 2, 4, 7; head sizes that are no power of two; biases; tied and untied; every rope scaling; windows.
TINY_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": _PLAIN_ROPE}),
    "llama-mha-bias": ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": ("llama", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-yarn": ("llama", {"rope_parameters": _YARN_ROPE, "head_dim": 40}),
    "llama-linear-rope": ("llama", {"rope_parameters": _LINEAR_ROPE, "intermediate_size": 50}),
    "llama-long-yarn": (
        "llama",
        {"rope_parameters": {**_YARN_ROPE, "factor": 8.0, "beta_fast": 4.0, "beta_slow": 0.5}, "head_dim": 64},
    ),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "mistral-window": ("mistral", {"sliding_window": 40}),
    "qwen2": ("qwen2", {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 112}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 40}),
    "qwen3-tied": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3-moe": ("qwen3_moe", {**_EXPERTS, "head_dim": 24, "norm_topk_prob": True}),
    "qwen3-moe-shares": ("qwen3_moe", {**_EXPERTS, "num_experts_per_tok": 1, "norm_topk_prob": False}),
    "gemma2": ("gemma2", _GEMMA2),
    "gemma2-strong-caps": (
        "gemma2",
        {**_GEMMA2, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "head_dim": 40},
    ),
    "gemma3": ("gemma3_text", _GEMMA3),
    "gemma3-wide-heads": ("gemma3_text", {**_GEMMA3, "head_dim": 256, "num_key_value_heads": 1}),
    "gemma3-linear-rope": (
        "gemma3_text",
        {
            **_GEMMA3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                "sliding_attention": _PLAIN_ROPE,
            },
        },
    ),
}
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}


def make_tiny(row: str) -> transformers.PreTrainedModel:
    """A float32 model whose every parameter matters: no norm, bias or table is left as initialized."""
    model_type, changes = TINY_MODELS[row]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**_SIZES, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.normal_(std=1.2 * parameter.shape[1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def save_tiny(row: str, folder: Path) -> transformers.PreTrainedModel:
    model = make_tiny(row)
    model.save_pretrained(folder)
    return model


@dataclass
class PagedRequest:
    """A request whose blocks are strewn over the pool, with what has been computed of it."""

    token_ids: list[int]
    block_tables: list[list[int]]  # one per KV group
    num_computed_tokens: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)  # [tokens, V] of each step
    adapter: Any = None  # of the model's kernels


class PagedModel:
    """Drives a model step by step. Blocks out of a window are given up, as the engine does."""

    def __init__(
        self,
        model: Model,
        *,
        num_blocks: int = 200,
        block_size: int = 16,
        seed: int = 0,
        kv_dtype: str = "float32",
        make_program: Callable[[Model, KVStorage], Program] = compile_model,
    ) -> None:
        self.spec: ModelSpec = model.spec
        self.block_size = block_size
        self.kv = KVStorage(self.spec, num_blocks, block_size, kv_dtype, model.kernels)
        # What a block held before must not matter.
        fill_with_nan(self.kv._data)
        self.program = make_program(model, self.kv)
        self._rotary_tables = rotary_tables(self.spec)
        self._free = list(range(1, num_blocks))
        random.Random(seed).shuffle(self._free)

    def add(self, token_ids: list[int], adapter: Any = None) -> PagedRequest:
        num_blocks = -(-len(token_ids) // self.block_size)
        tables = [[self._free.pop() for _ in range(num_blocks)] for _ in self.spec.kv_groups]
        return PagedRequest(token_ids, tables, adapter=adapter)

    def step(self, work: Iterable[tuple[PagedRequest, int]]) -> None:
        """Compute the next so many tokens of each request; keeps the logits of all of them."""
        pairs = [(request, min(n, len(request.token_ids) - request.num_computed_tokens)) for request, n in work]
        pairs = [(request, n) for request, n in pairs if n]
        if not pairs:
            return
        batch = self.make_batch(pairs)
        self.program.forward(batch)
        logits = torch.as_tensor(self.program.logits(batch.logits_indices, batch.adapters))
        for (request, num_tokens), rows in zip(pairs, logits.split([n for _, n in pairs]), strict=True):
            request.num_computed_tokens += num_tokens
            request.logits.append(rows.clone())  # the next step's are written over them

    def run(self, request: PagedRequest, chunk: int) -> torch.Tensor:
        """All logits [tokens, V] of `request`, computed alone, `chunk` tokens at a time."""
        while request.num_computed_tokens < len(request.token_ids):
            self.step([(request, chunk)])
        return torch.cat(request.logits)

    def make_batch(self, pairs: list[tuple[PagedRequest, int]]) -> ForwardBatch:
        token_ids: list[int] = []
        positions: list[int] = []
        query_start_loc = [0]
        adapters: dict[int, tuple[Any, list[int]]] = {}
        for request, num_tokens in pairs:
            start = request.num_computed_tokens
            token_ids += request.token_ids[start : start + num_tokens]
            positions += range(start, start + num_tokens)
            query_start_loc.append(len(token_ids))
            if request.adapter is not None:
                own = adapters.setdefault(id(request.adapter), (request.adapter, []))[1]
                own += range(len(token_ids) - num_tokens, len(token_ids))
        return ForwardBatch(
            token_ids=np.array(token_ids),
            query_start_loc=np.array(query_start_loc),
            seq_lens=np.array([request.num_computed_tokens + n for request, n in pairs]),
            groups=tuple(self._group_batch(index, pairs, positions) for index in range(len(self.spec.kv_groups))),
            logits_indices=np.arange(len(token_ids)),
            adapters=tuple((adapter, np.array(rows)) for adapter, rows in adapters.values()),
        )

    def _group_batch(self, index: int, pairs: list[tuple[PagedRequest, int]], positions: list[int]) -> GroupBatch:
        window = self.spec.kv_groups[index].sliding_window
        width = max(len(request.block_tables[index]) for request, _ in pairs)
        tables, slots = [], []
        for request, num_tokens in pairs:
            table = request.block_tables[index]
            start = request.num_computed_tokens
            if window is not None:
                for lost in range(max(0, start - window + 1) // self.block_size):
                    table[lost] = 0
            tables.append(table + [0] * (width - len(table)))
            slots += [
                table[position // self.block_size] * self.block_size + position % self.block_size
                for position in range(start, start + num_tokens)
            ]
        rotation = Rotation(self._rotary_tables[index], np.array(positions), max(positions) + 1)
        return GroupBatch(np.array(slots), np.array(tables), rotation)


def fill_with_nan(cache: Any) -> None:
    """Of any backend; as the bits of bfloat16 where numpy holds them."""
    if isinstance(cache, torch.Tensor) and cache.element_size() == 1:
        cache.view(torch.uint8).fill_(0xFF)  # packed: no code is one, but every scale
    else:
        cache[...] = 0x7FC0 if cache.dtype == np.uint16 else math.nan
