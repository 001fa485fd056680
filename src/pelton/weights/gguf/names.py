"""GGUF tensor names and layouts <-> those of Hugging Face.

Two layouts differ. Llama files hold the rows of q and k in interleaved order (pairs of a rotation side
by side); here they go back to halves. Gemma files hold norm weights with 1 added; here it is taken off.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from pelton.core.model_spec import ModelSpec
from pelton.weights.architectures import ARCHITECTURES
from pelton.weights.tensors import WeightTensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Rotary factors are part of the spec; old files also hold the plain frequencies, which follow from it.
IGNORED_TENSORS = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_MODULE_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
# Of all experts of a layer, one behind another.
_EXPERT_NAMES = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_TWO_NORM_NAMES = {"ffn_norm": "post_attention_layernorm"}
_FOUR_NORM_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYER_TENSOR = re.compile(r"blk\.(0|[1-9]\d{0,4})\.(\w+)\.(weight|bias)")


def hf_name(gguf_name: str, architecture: str) -> str | None:
    """The Hugging Face name, or None for a tensor that the architecture does not know."""
    if gguf_name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[gguf_name]
    match = _LAYER_TENSOR.fullmatch(gguf_name)
    if match is None:
        return None
    layer_id, module, suffix = match.groups()
    norms = _FOUR_NORM_NAMES if ARCHITECTURES[architecture].sandwich_norms else _TWO_NORM_NAMES
    hf_module = _MODULE_NAMES.get(module) or norms.get(module)
    return None if hf_module is None else f"model.layers.{layer_id}.{hf_module}.{suffix}"


def expert_names(gguf_name: str, spec: ModelSpec) -> list[str]:
    """The Hugging Face names of the matrices in a tensor [experts, out, in]; none where it is no such tensor."""
    match = _LAYER_TENSOR.fullmatch(gguf_name)
    module = _EXPERT_NAMES.get(match[2]) if match is not None else None
    if match is None or module is None or match[3] != "weight":
        return []
    return [f"model.layers.{match[1]}.mlp.experts.{i}.{module}.weight" for i in range(spec.num_experts)]


def restore_layout(tensor: WeightTensor, spec: ModelSpec) -> WeightTensor:
    """`tensor` with Hugging Face's name and GGUF's layout -> Hugging Face's layout. Copies only what changes.

    Rows are packed independently, so that their order can change without decoding them.
    """
    if spec.architecture == "llama":
        if tensor.name.endswith(("self_attn.q_proj.weight", "self_attn.q_proj.bias")):
            return replace(tensor, data=_rows_in_halves(tensor.data, spec.num_heads, spec.head_dim))
        if tensor.name.endswith(("self_attn.k_proj.weight", "self_attn.k_proj.bias")):
            return replace(tensor, data=_rows_in_halves(tensor.data, spec.num_kv_heads, spec.head_dim))
    if ARCHITECTURES[spec.architecture].sandwich_norms and tensor.name.endswith("norm.weight"):
        return replace(tensor, format="F32", data=_minus_one(tensor))
    return tensor


def _minus_one(tensor: WeightTensor) -> npt.NDArray[np.uint8]:
    import numpy as np

    from pelton.weights.dequantize import dequantize

    with np.errstate(invalid="ignore"):  # NaN from a damaged file stays NaN
        weights = dequantize(tensor) - np.float32(1.0)
    return weights.view(np.uint8)


def _rows_in_halves(data: npt.NDArray[np.uint8], num_heads: int, head_dim: int) -> npt.NDArray[np.uint8]:
    """Row 2j + i of each head moves to row i * head_dim / 2 + j."""
    import numpy as np

    rows = data.reshape(num_heads, head_dim // 2, 2, -1)
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1)
