"""The architectures that Pelton implements: their names in model files, and the tensors they need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pelton.core.errors import ModelFileError, UnsupportedModelError
from pelton.core.model_spec import ModelSpec
from pelton.weights.mapped_file import shown

MAX_LAYERS = 4096
MAX_WIDTH = 1 << 20  # hidden and intermediate sizes, heads
MAX_VOCABULARY = 1 << 24
MAX_EXPERTS = 4096  # of a layer


@dataclass(frozen=True, slots=True)
class Architecture:
    name: str
    class_names: tuple[str, ...]  # `architectures` of config.json
    model_types: tuple[str, ...]  # `model_type` of config.json
    gguf_name: str  # `general.architecture`
    qk_norm: bool = False  # RMSNorm over each head of q and k
    is_mixture: bool = False  # of experts
    sandwich_norms: bool = False  # norms before and after both attention and MLP (Gemma)


ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", ("LlamaForCausalLM",), ("llama",), "llama"),
        Architecture("mistral", ("MistralForCausalLM",), ("mistral",), "llama"),
        Architecture("qwen2", ("Qwen2ForCausalLM",), ("qwen2",), "qwen2"),
        Architecture("qwen3", ("Qwen3ForCausalLM",), ("qwen3",), "qwen3", qk_norm=True),
        Architecture("qwen3_moe", ("Qwen3MoeForCausalLM",), ("qwen3_moe",), "qwen3moe", qk_norm=True, is_mixture=True),
        Architecture("gemma2", ("Gemma2ForCausalLM",), ("gemma2",), "gemma2", sandwich_norms=True),
        Architecture(
            "gemma3",
            ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
            ("gemma3_text", "gemma3"),
            "gemma3",
            qk_norm=True,
            sandwich_norms=True,
        ),
    )
}


def unsupported_architecture(path: Path, name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{path}: architecture {shown(name)} is not supported; supported are {', '.join(ARCHITECTURES)}"
    )


def check_spec(path: Path, spec: ModelSpec) -> None:
    """Relations between sizes that every architecture relies on."""
    if spec.num_heads % spec.num_kv_heads:
        raise ModelFileError(path, f"{spec.num_heads} query heads cannot share {spec.num_kv_heads} key-value heads")
    for rope in filter(None, (spec.rope, spec.rope_local)):
        if rope.theta <= 1:
            raise ModelFileError(path, f"rotary base {rope.theta} must be greater than 1")
        if rope.rotary_dim % 2 or not 2 <= rope.rotary_dim <= spec.head_dim:
            raise ModelFileError(
                path, f"rotary dimension {rope.rotary_dim} must be even and at most the head size {spec.head_dim}"
            )
        if rope.frequency_factors is not None and len(rope.frequency_factors) != rope.rotary_dim // 2:
            raise ModelFileError(
                path, f"{len(rope.frequency_factors)} rotary frequency factors; {rope.rotary_dim // 2} are expected"
            )


def expected_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor that a model of this spec has."""
    embedding = (spec.vocab_size, spec.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": (spec.hidden_size,),
    }
    if not spec.tie_word_embeddings:
        shapes["lm_head.weight"] = embedding
    layer = _layer_tensors(spec)
    for layer_id in range(spec.num_layers):
        shapes |= {f"model.layers.{layer_id}.{name}": shape for name, shape in layer.items()}
    return shapes


def _layer_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    architecture = ARCHITECTURES[spec.architecture]
    norms = ["input_layernorm", "post_attention_layernorm"]
    if architecture.sandwich_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    shapes: dict[str, tuple[int, ...]] = {f"{norm}.weight": (hidden,) for norm in norms}
    projections = {
        "self_attn.q_proj": (q_size, hidden, spec.attention_bias),
        "self_attn.k_proj": (kv_size, hidden, spec.attention_bias),
        "self_attn.v_proj": (kv_size, hidden, spec.attention_bias),
        "self_attn.o_proj": (hidden, q_size, spec.attention_output_bias),
    }
    if spec.num_experts:
        projections["mlp.gate"] = (spec.num_experts, hidden, False)
        mlps = [(f"mlp.experts.{i}", spec.expert_size) for i in range(spec.num_experts)]
    else:
        mlps = [("mlp", inner)]
    for mlp, size in mlps:
        projections[f"{mlp}.gate_proj"] = projections[f"{mlp}.up_proj"] = (size, hidden, spec.mlp_bias)
        projections[f"{mlp}.down_proj"] = (hidden, size, spec.mlp_bias)
    for name, (num_out, num_in, has_bias) in projections.items():
        shapes[f"{name}.weight"] = (num_out, num_in)
        if has_bias:
            shapes[f"{name}.bias"] = (num_out,)
    if architecture.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (spec.head_dim,), "self_attn.k_norm.weight": (spec.head_dim,)}
    return shapes
