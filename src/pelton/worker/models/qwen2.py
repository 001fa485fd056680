"""Qwen2 and Qwen2.5: Llama's layers with biases on query, key and value (`ModelSpec.attention_bias`)."""

from pelton.worker.models.llama import LlamaModel


class Qwen2Model(LlamaModel):
    pass
