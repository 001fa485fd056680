"""The protobuf wire format, as far as SentencePiece models need it (protobuf.dev, Encoding)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

Value = int | bytes

_MAX_VARINT_BYTES = 10


def read_fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """(field number, value) in file order; a value is an int, or the bytes of anything longer.

    Raises `ValueError` for bytes that are no such message.
    """
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire_type == 2:
            size, position = _varint(data, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {position}")
        if size > len(data) - position:
            raise ValueError(f"a field at byte {position} reaches past the end")
        yield number, data[position : position + size]
        position += size


def as_float(value: Value) -> float:
    if not isinstance(value, bytes) or len(value) != 4:
        raise ValueError("a float field does not hold 4 bytes")
    return float(struct.unpack("<f", value)[0])


def as_int(value: Value) -> int:
    """A signed 32-bit field: negative ones come as 64-bit two's complement."""
    if not isinstance(value, int):
        raise ValueError("an integer field holds bytes")
    return value - (1 << 64) if value >= 1 << 63 else value


def as_bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field of bytes holds an integer")
    return value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for i, byte in enumerate(data[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, position + i + 1
    raise ValueError(f"an integer at byte {position} does not end")
