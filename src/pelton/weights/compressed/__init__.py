"""Weights in integers inside safetensors: GPTQ, AWQ, compressed-tensors."""

from pelton.weights.compressed.scheme import CompressedScheme, scheme_from_config
from pelton.weights.compressed.tensor import CompressedTensor

__all__ = ["CompressedScheme", "CompressedTensor", "scheme_from_config"]
