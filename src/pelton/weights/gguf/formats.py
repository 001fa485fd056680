"""Sizes of the tensor formats that Pelton reads. Names and numbers are those of ggml, but for INT4, INT8, FP8 and those
by channel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorFormat:
    """A row is a whole number of blocks; a block holds `block_size` values in `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int


FORMATS: dict[str, TensorFormat] = {
    tensor_format.name: tensor_format
    for tensor_format in (
        TensorFormat("F32", 1, 4),
        TensorFormat("F16", 1, 2),
        TensorFormat("BF16", 1, 2),
        TensorFormat("Q4_0", 32, 18),
        TensorFormat("Q4_1", 32, 20),
        TensorFormat("Q5_0", 32, 22),
        TensorFormat("Q5_1", 32, 24),
        TensorFormat("Q8_0", 32, 34),
        TensorFormat("Q2_K", 256, 84),
        TensorFormat("Q3_K", 256, 110),
        TensorFormat("Q4_K", 256, 144),
        TensorFormat("Q5_K", 256, 176),
        TensorFormat("Q6_K", 256, 210),
        TensorFormat("IQ4_NL", 32, 18),
        TensorFormat("IQ4_XS", 256, 136),
        # Pelton's own, for compressed safetensors: a float32 scale, INT4: and minimum, then codes as in Q4_1 and Q8_0.
        TensorFormat("INT4", 32, 24),
        TensorFormat("INT8", 32, 36),
        TensorFormat("FP8", 32, 36),  # float8 e4m3, likewise
        TensorFormat("INT8_CHANNEL", 32, 36),  # as INT8, with the same scale in all blocks of a row
        # The same scale in all blocks of a row, step and base of 8 bits, codes: scale * (base + step * q - 128).
        TensorFormat("INT4_CHANNEL", 32, 22),
    )
}

# Every type number that ggml has given out; those without an entry in FORMATS are refused by name.
GGML_TYPE_NAMES: dict[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}

# `general.file_type` of llama.cpp (llama_ftype) as users know it.
FILE_TYPE_NAMES: dict[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    21: "Q2_K_S",
    25: "IQ4_NL",
    30: "IQ4_XS",
    32: "BF16",
}
