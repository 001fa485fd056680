"""Qwen3-MoE: Qwen3's layers with a mixture of experts for each feed-forward layer (`ModelSpec.num_experts`)."""

from pelton.worker.models.qwen3 import Qwen3Model


class Qwen3MoeModel(Qwen3Model):
    pass
