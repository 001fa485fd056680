"""`ModelSpec`: the shape of a model, enough to size the KV cache and choose the model file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding. `scaling_*` follow Hugging Face's `rope_scaling` kinds."""

    theta: float
    rotary_dim: int
    scaling_kind: str = "none"  # none | linear | llama3 | yarn
    scaling_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    # Per-dimension divisors of the frequencies (GGUF `rope_freqs.weight`), length rotary_dim // 2.
    frequency_factors: tuple[float, ...] | None = None
    attention_factor: float = 1.0  # yarn: scale of cos and sin
    beta_fast: float = 32.0  # yarn: rotations within the original length above which nothing is scaled
    beta_slow: float = 1.0  # yarn: rotations below which a frequency is divided by scaling_factor


@dataclass(frozen=True, slots=True)
class KVGroupSpec:
    """Layers that share one block table: same window, same number of layers in every group."""

    layer_ids: tuple[int, ...]
    sliding_window: int | None = None  # tokens seen, the current one included


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Architecture-independent description, resolved from config.json or GGUF metadata.

    Lengths are in elements: `hidden_size` H, `intermediate_size` F, `head_dim` D, `vocab_size` V.
    """

    architecture: str  # registry name: llama, mistral, qwen2, qwen3, qwen3_moe, gemma2, gemma3
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    rms_norm_eps: float
    rope: RopeSpec
    rope_local: RopeSpec | None = None  # Gemma 3: rotary of the sliding-window layers
    kv_groups: tuple[KVGroupSpec, ...] = ()
    hidden_act: str = "silu"  # silu | gelu_tanh
    attention_bias: bool = False  # on q, k, v
    attention_output_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None  # Gemma 2
    final_softcap: float | None = None  # Gemma 2
    embedding_scale: float = 1.0  # Gemma: sqrt(hidden_size)
    num_experts: int = 0  # 0: feed-forward layers are no mixtures
    num_experts_per_token: int = 0
    expert_size: int = 0  # intermediate size of an expert
    normalizes_experts: bool = False  # weights of a token's experts add up to 1
    dtype: str = "float32"  # of the stored weights, before any quantization
    quantization: str | None = None  # name as users know it, for example Q4_K_M

    @property
    def num_layers_per_kv_group(self) -> int:
        """Layer slots of a block; the last group of a kind may leave some empty."""
        return max(len(group.layer_ids) for group in self.kv_groups)

    def kv_bytes_per_block(self, block_size: int, bytes_per_element: int) -> int:
        """Bytes of one block: keys and values of `block_size` positions in one group's layers."""
        elements = 2 * self.num_layers_per_kv_group * block_size * self.num_kv_heads * self.head_dim
        return elements * bytes_per_element


def make_kv_groups(windows: list[int | None]) -> tuple[KVGroupSpec, ...]:
    """Group layers by window (`windows[i]` for layer i) into groups of equal size.

    Every group gets the layer count of the smallest kind, so that a block of any group has the same
    number of bytes and all groups draw from one pool (the hybrid allocator of vLLM v1).
    """
    by_window: dict[int | None, list[int]] = {}
    for layer_id, window in enumerate(windows):
        by_window.setdefault(window, []).append(layer_id)
    size = min(len(ids) for ids in by_window.values())
    groups = []
    # Full attention first: its prefix match bounds those of the windowed groups.
    for window, ids in sorted(by_window.items(), key=lambda item: (item[0] is not None, item[0] or 0)):
        groups += [KVGroupSpec(tuple(ids[i : i + size]), window) for i in range(0, len(ids), size)]
    return tuple(groups)
