"""Tiny compressed checkpoints, packed code by code as their formats are documented."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.weights.make_models import TINY_CONFIGS, random_tensors

# Which output of eight lies in which place of one of AWQ's words, lowest bits first.
_AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
_DTYPES = {
    "uint8": "F8_E4M3",
    "int8": "I8",
    "int32": "I32",
    "float16": "F16",
    "float32": "F32",
    "uint16": "BF16",
    "int64": "I64",
}

Tensors = dict[str, np.ndarray]  # uint16 stands for bfloat16, uint8 for float8


def pack_rows(codes: np.ndarray, bits: int = 4, places: tuple[int, ...] | None = None) -> np.ndarray:
    """Unsigned codes [R, C] -> int32 [R, C * bits / 32]: consecutive codes in a word, lowest bits first."""
    per_word = 32 // bits
    padded = np.zeros((codes.shape[0], -(-codes.shape[1] // per_word) * per_word), np.uint32)
    padded[:, : codes.shape[1]] = codes
    words = np.zeros((codes.shape[0], padded.shape[1] // per_word), np.uint32)
    for place in range(per_word):
        words |= padded[:, (places or range(per_word))[place] :: per_word] << np.uint32(bits * place)
    return words.view(np.int32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Cut off, as uint16."""
    return (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_e4m3(codes: np.ndarray) -> np.ndarray:
    """A sign, 4 bits of exponent (7 stands for 0), 3 of mantissa, to which 1 is added unless the exponent is 0."""
    exponents, mantissas = ((codes >> 3) & 15).astype(np.float32), (codes & 7).astype(np.float32) / np.float32(8)
    values = np.where(exponents > 0, np.exp2(exponents - 7) * (1 + mantissas), np.exp2(np.float32(-6)) * mantissas)
    return np.where(codes & 128, -values, values).astype(np.float32)


@dataclass(frozen=True)
class Layout:
    """A way to compress; `config` is the model's quantization_config."""

    config: dict[str, Any]
    method: str
    bits: int = 4
    group_size: int | None = None
    scale_dtype: str = "F16"
    has_zeros: bool = False
    expected_format: str = "Q4_0"
    extra: dict[str, Any] = field(default_factory=dict)

    def compress(self, module: str, shape: tuple[int, int], rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        """Random stored tensors of a matrix [O, I], and the float32 values that they stand for."""
        num_outputs, num_inputs = shape
        if self.method == "fp8":
            return self._compress_fp8(module, shape, rng)
        group_size = self.group_size or num_inputs
        num_groups = num_inputs // group_size
        codes = rng.integers(0, 1 << self.bits, shape)
        middle = 1 << (self.bits - 1)
        zeros = (
            rng.integers(1, 15, (num_outputs, num_groups))
            if self.has_zeros
            else np.full((num_outputs, num_groups), middle)
        )
        scales, stored = self._scales(rng, num_outputs, num_groups)
        values = scales.repeat(group_size, 1) * (codes - zeros.repeat(group_size, 1)).astype(np.float32)
        return {f"{module}.{part}": array for part, array in self._parts(codes, zeros, stored).items()}, values

    def _compress_fp8(
        self, module: str, shape: tuple[int, int], rng: np.random.Generator
    ) -> tuple[Tensors, np.ndarray]:
        codes = rng.integers(0, 256, shape).astype(np.uint8)
        codes[codes & 127 == 127] = 0  # NaN
        count = (shape[0], 1) if self.group_size is None else (-(-shape[0] // 128), -(-shape[1] // 128))
        scales, stored = self._scales(rng, *count)
        by_weight = scales if self.group_size is None else scales.repeat(128, 0).repeat(128, 1)[: shape[0], : shape[1]]
        part = "weight_scale" if self.group_size is None else "weight_scale_inv"
        parts = {f"{module}.weight": codes, f"{module}.{part}": stored}
        return parts, from_e4m3(codes) * by_weight

    def _scales(self, rng: np.random.Generator, num_outputs: int, num_groups: int) -> tuple[np.ndarray, np.ndarray]:
        scales = (rng.uniform(1e-3, 1e-2, (num_outputs, num_groups)) * 16 / (1 << self.bits)).astype(np.float32)
        if self.scale_dtype == "F16":
            stored = scales.astype(np.float16)
            return stored.astype(np.float32), stored
        if self.scale_dtype == "BF16":
            stored = to_bfloat16(scales)
            return from_bfloat16(stored), stored
        return scales, scales

    def _parts(self, codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> Tensors:
        num_inputs = codes.shape[1]
        if self.method == "gptq":
            offset = 0 if self.config.get("checkpoint_format") == "gptq_v2" else 1
            groups = np.arange(num_inputs) // (self.group_size or num_inputs)
            qweight = np.ascontiguousarray(pack_rows(codes).T)
            scales = np.ascontiguousarray(scales.T)
            return {
                "qweight": qweight,
                "qzeros": pack_rows(zeros.T - offset),
                "scales": scales,
                "g_idx": groups.astype(np.int32),
            }
        if self.method == "awq":
            qweight, qzeros = pack_rows(codes.T, places=_AWQ_PLACES), pack_rows(zeros.T, places=_AWQ_PLACES)
            return {"qweight": qweight, "qzeros": qzeros, "scales": np.ascontiguousarray(scales.T)}
        if self.method == "plain":
            return {"weight": (codes - 128).astype(np.int8), "weight_scale": scales}
        parts = {"weight_packed": pack_rows(codes, self.bits), "weight_scale": scales}
        parts["weight_shape"] = np.array(codes.shape, np.int64)
        if self.has_zeros:
            parts["weight_zero_point"] = np.ascontiguousarray(pack_rows(zeros.T).T)
        return parts


def _weights(bits: int, strategy: str, group_size: int | None = None, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": group_size, **more}


_PER_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def compressed_tensors(
    container: str, weights: dict[str, Any], activations: dict[str, Any] | None = None
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": container,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _gptq(**more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, **more}


_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}

LAYOUTS: dict[str, Layout] = {
    "gptq": Layout(_gptq(), "gptq", group_size=32),
    "gptq channel": Layout(_gptq(group_size=-1), "gptq"),
    "gptq v2, zeros": Layout(
        _gptq(checkpoint_format="gptq_v2", sym=False), "gptq", group_size=32, has_zeros=True, expected_format="INT4"
    ),
    "gptq, zeros": Layout(_gptq(sym=False), "gptq", group_size=32, has_zeros=True, expected_format="INT4"),
    "awq": Layout(_AWQ, "awq", group_size=32, has_zeros=True, expected_format="INT4"),
    "w8a8": Layout(
        compressed_tensors("int-quantized", _weights(8, "channel")),
        "plain",
        8,
        scale_dtype="BF16",
        expected_format="Q8_0",
    ),
    "w8a8, float32 scales": Layout(
        compressed_tensors("int-quantized", _weights(8, "channel")),
        "plain",
        8,
        scale_dtype="F32",
        expected_format="INT8",
    ),
    "w8a8, activations by token": Layout(
        compressed_tensors("int-quantized", _weights(8, "channel"), _PER_TOKEN),
        "plain",
        8,
        scale_dtype="BF16",
        expected_format="INT8_CHANNEL",
    ),
    "w8a8, activations by tensor": Layout(
        compressed_tensors("int-quantized", _weights(8, "channel"), {**_PER_TOKEN, "strategy": "tensor"}),
        "plain",
        8,
        scale_dtype="BF16",
        expected_format="Q8_0",
    ),
    "w8a16": Layout(
        compressed_tensors("pack-quantized", _weights(8, "channel")),
        "packed",
        8,
        scale_dtype="BF16",
        expected_format="Q8_0",
    ),
    "fp8": Layout(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        "fp8",
        8,
        128,
        scale_dtype="BF16",
        expected_format="FP8",
    ),
    "fp8 channel": Layout(
        compressed_tensors("float-quantized", {**_weights(8, "channel"), "type": "float"}),
        "fp8",
        8,
        scale_dtype="F32",
        expected_format="FP8",
    ),
    "w4a16": Layout(
        compressed_tensors("pack-quantized", _weights(4, "group", 32)), "packed", group_size=32, scale_dtype="BF16"
    ),
    "w4a16, zeros": Layout(
        compressed_tensors("pack-quantized", _weights(4, "group", 32, symmetric=False)),
        "packed",
        group_size=32,
        scale_dtype="BF16",
        has_zeros=True,
        expected_format="INT4",
    ),
}


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A safetensors file; uint16 is written as BF16, which numpy does not know."""
    header, position = {}, 0
    for name, array in tensors.items():
        offsets = [position, position + array.nbytes]
        header[name] = {"dtype": _DTYPES[str(array.dtype)], "shape": list(array.shape), "data_offsets": offsets}
        position += array.nbytes
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_compressed(folder: Path, layout: Layout, architecture: str = "llama") -> tuple[Tensors, Tensors]:
    """A model whose projections are compressed. Returns what was stored, and the float32 weights meant."""
    config = {**TINY_CONFIGS[architecture], "intermediate_size": 96}
    rng = np.random.default_rng(0)
    stored, meant = {}, random_tensors(config)
    for name, values in meant.items():
        if "_proj.weight" in name:
            parts, meant[name] = layout.compress(name.removesuffix(".weight"), values.shape, rng)
            stored |= parts
        else:
            stored[name] = values
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": layout.config}))
    write_tensors(folder / "model.safetensors", stored)
    return stored, meant
