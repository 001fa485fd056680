"""Layers built from a model file's tensors, named as in Hugging Face's modules."""

from __future__ import annotations

import numpy as np

from pelton.core.model_spec import ModelSpec
from pelton.weights.dequantize import dequantize
from pelton.worker.kernels.ops import Kernels, LoraSite
from pelton.worker.layers.attention import Attention
from pelton.worker.layers.embedding import LMHead, TokenEmbedding
from pelton.worker.layers.linear import Linear, Product
from pelton.worker.layers.mlp import GatedMLP
from pelton.worker.layers.moe import MixtureOfExperts
from pelton.worker.layers.norm import RMSNorm
from pelton.worker.models.weight_source import WeightSource
from pelton.worker.parallel import Gathered, Ranks, Summed, head_share


class ModelParts:
    """Makes the layers of one model. Tensors are decoded one matrix at a time, straight into their place."""

    def __init__(self, spec: ModelSpec, source: WeightSource, kernels: Kernels, ranks: Ranks | None = None) -> None:
        """With `ranks`, `spec` and `source` are of one of them."""
        self.spec = spec
        self.kernels = kernels
        self._source = source
        self._ranks = ranks
        self._loader = kernels.make_linear_loader()
        # Gemma's norms multiply by 1 + w; an architecture sets this before it asks for any.
        self.norm_offset = 0.0
        self.lora_sites: list[LoraSite] = []  # of the linear layers made so far

    def norm(self, name: str, size: int | None = None) -> RMSNorm:
        tensor = self._source.tensor(f"{name}.weight", (size or self.spec.hidden_size,))
        weight = dequantize(tensor) + np.float32(self.norm_offset)
        return RMSNorm(self.kernels.from_numpy(weight), self.spec.rms_norm_eps)

    def linear(self, outputs: dict[str, int], in_features: int, *, bias: bool = False) -> Linear:
        """One layer from the matrices `outputs` (name -> rows), one below another."""
        weight = self._loader.load(
            [self._source.tensor(f"{name}.weight", (size, in_features)) for name, size in outputs.items()]
        )
        site = self._add_site(outputs, in_features)
        if not bias:
            return Linear(weight, None, site)
        biases = [dequantize(self._source.tensor(f"{name}.bias", (size,))) for name, size in outputs.items()]
        return Linear(weight, self.kernels.from_numpy(np.concatenate(biases)), site)

    def _add_site(self, outputs: dict[str, int], in_features: int) -> int:
        self.lora_sites.append(LoraSite(tuple(outputs.items()), in_features))
        return len(self.lora_sites) - 1

    def attention(self, prefix: str, *, head_norms: bool = False) -> Attention:
        spec = self.spec
        query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        qkv = self.linear(
            {f"{prefix}.q_proj": query_size, f"{prefix}.k_proj": kv_size, f"{prefix}.v_proj": kv_size},
            spec.hidden_size,
            bias=spec.attention_bias,
        )
        output = self._summed(
            self.linear({f"{prefix}.o_proj": spec.hidden_size}, query_size, bias=spec.attention_output_bias)
        )
        if not head_norms:
            return Attention(spec, qkv, output)
        query_norm = self.norm(f"{prefix}.q_norm", spec.head_dim)
        key_norm = self.norm(f"{prefix}.k_norm", spec.head_dim)
        return Attention(spec, qkv, output, query_norm, key_norm)

    def _summed(self, layer: Product) -> Product:
        return layer if self._ranks is None else Summed(layer, self._ranks)

    def mlp(self, prefix: str) -> Product:
        return self._summed(self._experts(prefix) if self.spec.num_experts else self._gated(prefix))

    def _gated(self, prefix: str) -> GatedMLP:
        spec = self.spec
        gate_up = self.linear(
            {f"{prefix}.gate_proj": spec.intermediate_size, f"{prefix}.up_proj": spec.intermediate_size},
            spec.hidden_size,
            bias=spec.mlp_bias,
        )
        down = self.linear({f"{prefix}.down_proj": spec.hidden_size}, spec.intermediate_size, bias=spec.mlp_bias)
        return GatedMLP(gate_up, down, spec.hidden_act)

    def _experts(self, prefix: str) -> MixtureOfExperts:
        spec = self.spec
        router = self.linear({f"{prefix}.gate": spec.num_experts}, spec.hidden_size)
        wide, narrow = (spec.expert_size, spec.hidden_size), (spec.hidden_size, spec.expert_size)
        names = [f"{prefix}.experts.{i}" for i in range(spec.num_experts)]
        gate_up = [
            [self._source.tensor(f"{name}.{side}_proj.weight", wide) for side in ("gate", "up")] for name in names
        ]
        down = [self._source.tensor(f"{name}.down_proj.weight", narrow) for name in names]
        experts = self.kernels.make_experts(gate_up, down)
        return MixtureOfExperts(router, experts, spec.num_experts_per_token, spec.normalizes_experts)

    def embedding(self) -> TokenEmbedding:
        spec = self.spec
        table = self._source.tensor("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size))
        return TokenEmbedding(self.kernels.load_embedding(table), spec.embedding_scale)

    def lm_head(self) -> LMHead:
        spec = self.spec
        name = "model.embed_tokens" if spec.tie_word_embeddings else "lm_head"
        matrix = self._source.tensor(f"{name}.weight", (spec.vocab_size, spec.hidden_size))
        if self._ranks is not None:
            matrix = head_share(matrix, self._ranks)
        # A loader of its own: the buffer for the largest matrix must not outlive it.
        weight = self.kernels.make_linear_loader().load([matrix])
        # By this name for adapters, whether or not the matrix is the embedding's.
        site = self._add_site({"lm_head": spec.vocab_size}, spec.hidden_size)
        linear = Linear(weight, None, site)
        return LMHead(
            linear if self._ranks is None else Gathered(linear, self._ranks, spec.vocab_size), spec.final_softcap
        )
