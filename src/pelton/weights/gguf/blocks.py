"""Decoding packed blocks to float32 with numpy, bit for bit as ggml's own reference does.

Legend: n blocks; a decoder takes blocks uint8 `[n, block_bytes]` and fills out float32
`[n, block_size]`. Fields of a block are read through a structured dtype in ggml's order
(ggml-common.h); `d` and `m` are the float16 scale and offset of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

_NIBBLE = np.uint8(15)
_D = ("d", "<f2")
_M = ("m", "<f2")


def _fields(*members: Any) -> Callable[[U8], Any]:
    dtype = np.dtype(list(members))
    return lambda blocks: blocks.view(dtype)[:, 0]


_Q4_0 = _fields(_D, ("qs", "u1", 16))
_Q4_1 = _fields(_D, _M, ("qs", "u1", 16))
_Q5_0 = _fields(_D, ("qh", "u1", 4), ("qs", "u1", 16))
_Q5_1 = _fields(_D, _M, ("qh", "u1", 4), ("qs", "u1", 16))
_Q8_0 = _fields(_D, ("qs", "i1", 32))
_Q2_K = _fields(("scales", "u1", 16), ("qs", "u1", 64), _D, _M)
_Q3_K = _fields(("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), _D)
_Q4_K = _fields(_D, _M, ("scales", "u1", 12), ("qs", "u1", 128))
_Q5_K = _fields(_D, _M, ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128))
_Q6_K = _fields(("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), _D)
_IQ4_XS = _fields(_D, ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128))
_INT4 = _fields(("d", "<f4"), ("m", "<f4"), ("qs", "u1", 16))
_INT8 = _fields(("d", "<f4"), ("qs", "i1", 32))
_INT4_CHANNEL = _fields(("d", "<f4"), ("step", "u1"), ("base", "u1"), ("qs", "u1", 16))
# Of the formats that are whole numbers times a scale.
FIELDS = {
    "Q4_0": _Q4_0,
    "Q4_1": _Q4_1,
    "Q5_0": _Q5_0,
    "Q5_1": _Q5_1,
    "Q8_0": _Q8_0,
    "Q4_K": _Q4_K,
    "Q5_K": _Q5_K,
    "Q6_K": _Q6_K,
    "INT4": _INT4,
    "INT8": _INT8,
    "INT4_CHANNEL": _INT4_CHANNEL,
}

# The 16 levels of IQ4_NL and IQ4_XS.
_IQ4_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int8)


def _e4m3_values() -> F32:
    """The 256 values of float8 e4m3: no infinities, and NaN where all bits but the sign's are set."""
    codes = np.arange(256)
    exponents, mantissas = (codes >> 3) & 15, (codes & 7).astype(np.float64)
    values = np.where(exponents == 0, mantissas * 2.0**-9, (8.0 + mantissas) * 2.0 ** (exponents - 10))
    values[codes & 127 == 127] = np.nan
    return np.where(codes < 128, values, -values).astype(np.float32)


_E4M3 = _e4m3_values()


def _decode_f32(blocks: U8, out: F32) -> None:
    out.reshape(-1)[...] = blocks.reshape(-1).view("<f4")


def _decode_f16(blocks: U8, out: F32) -> None:
    out.reshape(-1)[...] = blocks.reshape(-1).view("<f2")


def _decode_bf16(blocks: U8, out: F32) -> None:
    bits = out.reshape(-1).view(np.uint32)
    np.left_shift(blocks.reshape(-1).view("<u2"), np.uint32(16), out=bits, dtype=np.uint32)


def _column(half: npt.NDArray[np.float16]) -> F32:
    """Scales `[n]` as a float32 column `[n, 1]`."""
    return half.astype(np.float32)[:, None]


def nibbles(qs: U8, group: int) -> U8:
    """`[n, bytes]` -> `[n, 2 * bytes]`: of each `group` bytes first the low halves, then the high ones."""
    packed = qs.reshape(len(qs), -1, group)
    values = np.empty((len(qs), packed.shape[1], 2, group), dtype=np.uint8)
    np.bitwise_and(packed, _NIBBLE, out=values[:, :, 0])
    np.right_shift(packed, np.uint8(4), out=values[:, :, 1])
    return values.reshape(len(qs), -1)


def fifth_bits(qh: U8) -> U8:
    """Bit i of `[n, 4]` bytes as 0 or 16 at `[n, i]`."""
    bits = np.unpackbits(qh, axis=1, bitorder="little")
    return np.left_shift(bits, np.uint8(4), out=bits)


def _decode_q4_0(blocks: U8, out: F32) -> None:
    block = _Q4_0(blocks)
    values = nibbles(block["qs"], 16)
    out[...] = np.subtract(values, np.uint8(8), out=values).view(np.int8)
    out *= _column(block["d"])


def _decode_q4_1(blocks: U8, out: F32) -> None:
    block = _Q4_1(blocks)
    out[...] = nibbles(block["qs"], 16)
    out *= _column(block["d"])
    out += _column(block["m"])


def _decode_q5_0(blocks: U8, out: F32) -> None:
    block = _Q5_0(blocks)
    values = nibbles(block["qs"], 16)
    values |= fifth_bits(block["qh"])
    out[...] = np.subtract(values, np.uint8(16), out=values).view(np.int8)
    out *= _column(block["d"])


def _decode_q5_1(blocks: U8, out: F32) -> None:
    block = _Q5_1(blocks)
    values = nibbles(block["qs"], 16)
    values |= fifth_bits(block["qh"])
    out[...] = values
    out *= _column(block["d"])
    out += _column(block["m"])


def _decode_q8_0(blocks: U8, out: F32) -> None:
    block = _Q8_0(blocks)
    out[...] = block["qs"]
    out *= _column(block["d"])


def shifted(packed: U8, shifts: list[int], mask: int) -> U8:
    """`[n, groups, bytes]` -> `[n, groups, len(shifts), bytes]`: the masked bits at each shift."""
    values: U8 = packed[:, :, None, :] >> np.array(shifts, dtype=np.uint8)[:, None]
    values &= np.uint8(mask)
    return values


def _decode_q2_k(blocks: U8, out: F32) -> None:
    block = _Q2_K(blocks)
    scales, num_blocks = block["scales"], len(blocks)
    values = out.reshape(num_blocks, 16, 16)
    values[...] = shifted(block["qs"].reshape(num_blocks, 2, 32), [0, 2, 4, 6], 3).reshape(num_blocks, 16, 16)
    values *= (_column(block["d"]) * (scales & _NIBBLE))[:, :, None]
    values -= (_column(block["m"]) * (scales >> 4))[:, :, None]


def _decode_q3_k(blocks: U8, out: F32) -> None:
    block, num_blocks = _Q3_K(blocks), len(blocks)
    # Sixteen 6-bit scales: low halves in bytes 0..7 (nibbles), high bits in bytes 8..11 (pairs).
    packed = block["scales"]
    low = nibbles(packed[:, :8], 8)
    high = shifted(packed[:, None, 8:], [0, 2, 4, 6], 3).reshape(num_blocks, 16)
    scales = (low | (high << 4)).astype(np.int8) - np.int8(32)
    values = shifted(block["qs"].reshape(num_blocks, 2, 32), [0, 2, 4, 6], 3).reshape(num_blocks, 256)
    # A set bit of hmask means that 4 is not taken off.
    unset = shifted(block["hmask"][:, None, :], list(range(8)), 1).reshape(num_blocks, 256) ^ np.uint8(1)
    values -= np.left_shift(unset, np.uint8(2), out=unset)
    decoded = out.reshape(num_blocks, 16, 16)
    decoded[...] = values.view(np.int8).reshape(num_blocks, 16, 16)
    decoded *= (_column(block["d"]) * scales)[:, :, None]


def scales_and_mins(packed: U8) -> tuple[U8, U8]:
    """The 12 bytes of Q4_K and Q5_K -> eight 6-bit scales and eight 6-bit mins."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & _NIBBLE) | ((first >> 2) & 48)], axis=1)
    mins = np.concatenate([second & 63, (third >> 4) | ((second >> 2) & 48)], axis=1)
    return scales, mins


def _decode_with_mins(block: Any, values: U8, out: F32) -> None:
    """`values` `[n, 256]` in eight sub-blocks of 32, each with its scale and min."""
    scales, mins = scales_and_mins(block["scales"])
    decoded = out.reshape(len(out), 8, 32)
    decoded[...] = values.reshape(decoded.shape)
    decoded *= (_column(block["d"]) * scales)[:, :, None]
    decoded -= (_column(block["m"]) * mins)[:, :, None]


def _decode_q4_k(blocks: U8, out: F32) -> None:
    block = _Q4_K(blocks)
    _decode_with_mins(block, nibbles(block["qs"], 32), out)


def _decode_q5_k(blocks: U8, out: F32) -> None:
    block = _Q5_K(blocks)
    values = nibbles(block["qs"], 32)
    high = shifted(block["qh"][:, None, :], list(range(8)), 1).reshape(values.shape)
    values |= np.left_shift(high, np.uint8(4), out=high)
    _decode_with_mins(block, values, out)


def _decode_q6_k(blocks: U8, out: F32) -> None:
    block, num_blocks = _Q6_K(blocks), len(blocks)
    values = nibbles(block["ql"], 64)
    high = shifted(block["qh"].reshape(num_blocks, 2, 32), [0, 2, 4, 6], 3).reshape(values.shape)
    values |= np.left_shift(high, np.uint8(4), out=high)
    decoded = out.reshape(num_blocks, 16, 16)
    decoded[...] = np.subtract(values, np.uint8(32), out=values).view(np.int8).reshape(decoded.shape)
    decoded *= (_column(block["d"]) * block["scales"])[:, :, None]


def _decode_iq4_nl(blocks: U8, out: F32) -> None:
    block = _Q4_0(blocks)
    out[...] = _IQ4_LEVELS[nibbles(block["qs"], 16)]
    out *= _column(block["d"])


def _decode_iq4_xs(blocks: U8, out: F32) -> None:
    block, num_blocks = _IQ4_XS(blocks), len(blocks)
    low = shifted(block["scales_l"][:, :, None], [0, 4], 15).reshape(num_blocks, 8)
    high = (block["scales_h"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16)) & 3
    scales = (low | (high << 4)).astype(np.int8) - np.int8(32)
    decoded = out.reshape(num_blocks, 8, 32)
    decoded[...] = _IQ4_LEVELS[nibbles(block["qs"], 16)].reshape(decoded.shape)
    decoded *= (_column(block["d"]) * scales)[:, :, None]


def _decode_int4(blocks: U8, out: F32) -> None:
    block = _INT4(blocks)
    out[...] = nibbles(block["qs"], 16).reshape(out.shape)
    out *= block["d"][:, None]
    out -= block["m"][:, None]


def _decode_int8(blocks: U8, out: F32) -> None:
    block = _INT8(blocks)
    np.multiply(block["qs"], block["d"][:, None], out=out, dtype=np.float32)


def _decode_fp8(blocks: U8, out: F32) -> None:
    np.take(_E4M3, blocks[:, 4:], out=out)
    out *= _INT8(blocks)["d"][:, None]


def _decode_int4_channel(blocks: U8, out: F32) -> None:
    block = _INT4_CHANNEL(blocks)
    out[...] = nibbles(block["qs"], 16).reshape(out.shape)
    out *= block["step"][:, None]
    out += block["base"][:, None].astype(np.float32) - np.float32(128)
    out *= block["d"][:, None]


DECODERS: dict[str, Callable[[U8, F32], None]] = {
    "F32": _decode_f32,
    "F16": _decode_f16,
    "BF16": _decode_bf16,
    "Q4_0": _decode_q4_0,
    "Q4_1": _decode_q4_1,
    "Q5_0": _decode_q5_0,
    "Q5_1": _decode_q5_1,
    "Q8_0": _decode_q8_0,
    "Q2_K": _decode_q2_k,
    "Q3_K": _decode_q3_k,
    "Q4_K": _decode_q4_k,
    "Q5_K": _decode_q5_k,
    "Q6_K": _decode_q6_k,
    "IQ4_NL": _decode_iq4_nl,
    "IQ4_XS": _decode_iq4_xs,
    "INT4": _decode_int4,
    "INT8": _decode_int8,
    "INT8_CHANNEL": _decode_int8,
    "FP8": _decode_fp8,
    "INT4_CHANNEL": _decode_int4_channel,
}


def decode_blocks(format_name: str, blocks: U8, out: F32) -> None:
    """Fill `out` `[n, block_size]` from `blocks` `[n, block_bytes]`; both contiguous."""
    # Scales of a damaged file may be infinite or NaN; the values then are, too.
    with np.errstate(all="ignore"):
        DECODERS[format_name](blocks, out)
