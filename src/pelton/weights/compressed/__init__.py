"""Weights in integers inside safetensors: GPTQ, AWQ, compressed-tensors."""
