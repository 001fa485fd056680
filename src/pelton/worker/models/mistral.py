"""Mistral: Llama's layers; where it has a sliding window, the KV groups hold it."""

from pelton.worker.models.llama import LlamaModel


class MistralModel(LlamaModel):
    pass
