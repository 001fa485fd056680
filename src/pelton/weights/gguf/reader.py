"""GGUF container, versions 2 and 3: metadata and tensor directory over a memory map.

Layout (ggml's docs/gguf.md): magic, version, tensor count, key count, then the key-value pairs, then
the tensor infos, then padding to `general.alignment`, then tensor data. Everything is little-endian.
Nothing is allocated for a count before that count has been checked against the bytes that are left.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pelton.core.errors import ModelFileError, UnsupportedModelError
from pelton.weights.gguf.formats import FORMATS, GGML_TYPE_NAMES
from pelton.weights.mapped_file import drop_pages, map_file, shown

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_KEY_BYTES = 65535
MAX_TENSOR_NAME_BYTES = 1024
# Bounds on the work that a hostile file can ask for; real files stay far below.
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_ARRAY_LENGTH = 1 << 22
MAX_STRING_BYTES = 1 << 26

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_STRING = 8
_ARRAY = 9
_BOOL = 7
# GGUF value type -> code and size of its encoding for `struct`. Booleans are one byte, 0 or 1.
_SCALARS: dict[int, tuple[str, int]] = {
    0: ("B", 1),
    1: ("b", 1),
    2: ("H", 2),
    3: ("h", 2),
    4: ("I", 4),
    5: ("i", 4),
    6: ("f", 4),
    _BOOL: ("B", 1),
    10: ("Q", 8),
    11: ("q", 8),
    12: ("d", 8),
}


@dataclass(frozen=True, slots=True)
class GGUFTensorInfo:
    """`shape` is row-major (GGUF's own order reversed); `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    format: str
    offset: int
    num_bytes: int


class GGUFFile:
    """An opened file. The map is released when the last view of its tensors is gone."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        """Use `read_gguf`. Raises `ModelFileError`, or `UnsupportedModelError` for an unknown block format."""
        self.path = path
        self._data = data
        cursor = _Cursor(path, data)
        num_tensors, num_keys = _read_header(cursor)
        self.metadata: Mapping[str, Any] = _read_metadata(cursor, num_keys)
        alignment = _alignment(path, self.metadata)
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise UnsupportedModelError(f"{path}: one part of a split GGUF; merge the parts into one file first")
        infos = [_read_tensor_info(cursor, alignment) for _ in range(num_tensors)]
        data_start = -(-cursor.position // alignment) * alignment
        self.tensors: Mapping[str, GGUFTensorInfo] = _place_tensors(path, infos, data_start, len(data))

    def tensor_data(self, name: str) -> npt.NDArray[np.uint8]:
        """The packed bytes of a tensor, uint8 `[num_bytes]`, a read-only view of the map."""
        import numpy as np

        info = self.tensors[name]
        return np.frombuffer(self._data, dtype=np.uint8, count=info.num_bytes, offset=info.offset)

    def drop_pages(self) -> None:
        """See `ModelFiles.drop_pages`."""
        drop_pages(self._data)


def read_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file and check its header and directory; tensor data is not touched."""
    return GGUFFile(path, map_file(path))


class _Cursor:
    """Reads forward with every length checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap, position: int = 0) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.position = position

    def error(self, problem: str) -> ModelFileError:
        return ModelFileError(self.path, problem)

    def take(self, num_bytes: int, what: str) -> int:
        """Advance over `num_bytes` and return where they start."""
        start = self.position
        left = self.size - start
        if num_bytes > left:
            raise self.error(f"truncated or corrupt: {what} at byte {start} needs {num_bytes} bytes of {left} left")
        self.position = start + num_bytes
        return start

    def u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self.data, self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self.data, self.take(8, what))[0]
        return value

    def text(self, what: str, max_bytes: int | None = None) -> str:
        num_bytes = self.u64(f"length of {what}")
        if max_bytes is not None and num_bytes > max_bytes:
            raise self.error(
                f"{what} at byte {self.position} is {num_bytes} bytes long; at most {max_bytes} are allowed"
            )
        start = self.take(num_bytes, what)
        try:
            return self.data[start : start + num_bytes].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} at byte {start} is not valid UTF-8") from error

    def check_count(self, count: int, min_bytes: int, what: str, most: int | None = None) -> None:
        """Refuse a count that cannot fit into the rest of the file, before acting on it."""
        if count * min_bytes > self.size - self.position or (most is not None and count > most):
            raise self.error(f"corrupt: the file claims {count} {what} at byte {self.position}, more than it can hold")

    def skip_value(self, kind: int, key: str) -> None:
        if kind in _SCALARS:
            self.take(_SCALARS[kind][1], f"value of {shown(key)}")
        elif kind == _STRING:
            num_bytes = self.u64(f"length of {shown(key)}")
            self.check_count(num_bytes, 1, f"bytes in {shown(key)}", MAX_STRING_BYTES)
            self.position += num_bytes
        elif kind == _ARRAY:
            self._skip_array(key)
        else:
            raise self.error(f"metadata key {shown(key)} has unknown value type {kind}")

    def _skip_array(self, key: str) -> None:
        kind, count = self.u32(f"element type of {shown(key)}"), self.u64(f"length of {shown(key)}")
        if kind in _SCALARS:
            itemsize = _SCALARS[kind][1]
            self.check_count(count, itemsize, f"elements in {shown(key)}", MAX_ARRAY_LENGTH)
            self.position += count * itemsize
        elif kind == _STRING:
            self.check_count(count, 8, f"strings in {shown(key)}", MAX_ARRAY_LENGTH)
            self._skip_strings(count, key)
        elif kind == _ARRAY:
            raise self.error(f"metadata key {shown(key)} is an array of arrays, which no model file uses")
        else:
            raise self.error(f"metadata key {shown(key)} has unknown element type {kind}")

    def _skip_strings(self, count: int, key: str) -> None:
        # A vocabulary has 10^5 strings and more, so this loop is as bare as it can be.
        data, position, last, unpack = self.data, self.position, self.size - 8, _U64.unpack_from
        for _ in range(count):
            if position > last:
                break
            position += 8 + unpack(data, position)[0]
        else:
            if position <= self.size:
                self.position = position
                return
        raise self.error(f"truncated or corrupt: a string of {shown(key)} reaches past the end of the file")


class _Metadata(Mapping[str, Any]):
    """Values are decoded at each access: keep what you use. Arrays come as lists.

    Raises `KeyError` for an absent key, `ModelFileError` for a value that cannot be decoded.
    """

    def __init__(self, path: Path, data: mmap.mmap, entries: dict[str, tuple[int, int]]) -> None:
        self._path = path
        self._data = data
        self._entries = entries  # key -> value type, position

    def __getitem__(self, key: str) -> Any:
        kind, position = self._entries[key]
        return self._decode(_Cursor(self._path, self._data, position), kind, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def _decode(self, cursor: _Cursor, kind: int, key: str) -> Any:
        if kind == _STRING:
            return cursor.text(f"metadata value {shown(key)}")
        if kind != _ARRAY:
            return self._numbers(cursor, kind, 1, key)[0]
        kind, count = cursor.u32(key), cursor.u64(key)
        if kind == _STRING:
            return self._strings(cursor, count, key)
        return self._numbers(cursor, kind, count, key)

    def _numbers(self, cursor: _Cursor, kind: int, count: int, key: str) -> list[Any]:
        code, itemsize = _SCALARS[kind]
        values = struct.unpack_from(f"<{count}{code}", self._data, cursor.take(count * itemsize, key))
        if kind != _BOOL:
            return list(values)
        if max(values, default=0) > 1:
            raise ModelFileError(self._path, f"metadata key {shown(key)} holds a boolean that is neither 0 nor 1")
        return list(map(bool, values))

    def _strings(self, cursor: _Cursor, count: int, key: str) -> list[str]:
        data, position, unpack, strings = self._data, cursor.position, _U64.unpack_from, []
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack(data, position)[0]
                strings.append(data[start:position].decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ModelFileError(self._path, f"string {len(strings)} of {shown(key)} is not valid UTF-8") from error
        cursor.position = position
        return strings


def _read_header(cursor: _Cursor) -> tuple[int, int]:
    """Returns the number of tensors and of metadata keys."""
    magic = cursor.data[cursor.take(4, "magic") : 4]
    if magic != MAGIC:
        raise cursor.error(f"not a GGUF file: it starts with {magic!r}, not {MAGIC!r}")
    version = cursor.u32("version")
    if version & 0xFFFF == 0 and version != 0:
        raise cursor.error("big-endian GGUF is not supported; convert the file to little-endian")
    if version not in SUPPORTED_VERSIONS:
        raise cursor.error(f"GGUF version {version} is not supported; versions 2 and 3 are")
    num_tensors, num_keys = cursor.u64("tensor count"), cursor.u64("key count")
    # The smallest key-value pair has an empty key and one byte; the smallest tensor info one dimension.
    cursor.check_count(num_keys, 8 + 4 + 1, "metadata keys", MAX_KEYS)
    cursor.check_count(num_tensors, 8 + 4 + 8 + 4 + 8, "tensors", MAX_TENSORS)
    return num_tensors, num_keys


def _read_metadata(cursor: _Cursor, num_keys: int) -> _Metadata:
    entries: dict[str, tuple[int, int]] = {}
    for _ in range(num_keys):
        key = cursor.text("metadata key", MAX_KEY_BYTES)
        if key in entries:
            raise cursor.error(f"metadata key {shown(key)} occurs twice")
        kind = cursor.u32(f"type of {shown(key)}")
        entries[key] = (kind, cursor.position)
        cursor.skip_value(kind, key)
    return _Metadata(cursor.path, cursor.data, entries)


def _alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ModelFileError(path, f"general.alignment is {alignment!r}; it must be a power of two")
    return alignment


def _read_tensor_info(cursor: _Cursor, alignment: int) -> GGUFTensorInfo:
    """`offset` still counts from the start of the data section."""
    name = cursor.text("tensor name", MAX_TENSOR_NAME_BYTES)
    num_dimensions = cursor.u32(f"number of dimensions of {shown(name)}")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise cursor.error(f"tensor {shown(name)} has {num_dimensions} dimensions; 1 to {MAX_DIMENSIONS} are allowed")
    shape = tuple(cursor.u64(f"dimensions of {shown(name)}") for _ in range(num_dimensions))[::-1]
    type_number = cursor.u32(f"type of {shown(name)}")
    offset = cursor.u64(f"offset of {shown(name)}")
    type_name = GGML_TYPE_NAMES.get(type_number)
    if type_name is None:
        raise cursor.error(f"tensor {shown(name)} has unknown type number {type_number}")
    tensor_format = FORMATS.get(type_name)
    if tensor_format is None:
        raise UnsupportedModelError(
            f"{cursor.path}: tensor {shown(name)} is stored as {type_name}; supported formats are {', '.join(FORMATS)}"
        )
    num_elements = 1
    for length in shape:
        num_elements *= length
    if num_elements == 0:
        raise cursor.error(f"tensor {shown(name)} of shape {shape} is empty")
    if shape[-1] % tensor_format.block_size:
        raise cursor.error(
            f"rows of {shown(name)} have {shape[-1]} values; {type_name} needs a multiple of {tensor_format.block_size}"
        )
    if offset % alignment:
        raise cursor.error(
            f"tensor {shown(name)} starts at {offset}, which is not a multiple of the alignment {alignment}"
        )
    num_bytes = num_elements // tensor_format.block_size * tensor_format.block_bytes
    return GGUFTensorInfo(name, shape, type_name, offset, num_bytes)


def _place_tensors(
    path: Path, infos: list[GGUFTensorInfo], data_start: int, file_size: int
) -> dict[str, GGUFTensorInfo]:
    tensors: dict[str, GGUFTensorInfo] = {}
    for info in infos:
        if info.name in tensors:
            raise ModelFileError(path, f"tensor {shown(info.name)} occurs twice")
        offset = data_start + info.offset
        if offset + info.num_bytes > file_size:
            raise ModelFileError(
                path,
                f"truncated or corrupt: tensor {shown(info.name)} needs bytes {offset} to {offset + info.num_bytes}, "
                f"the file has {file_size}",
            )
        tensors[info.name] = GGUFTensorInfo(info.name, info.shape, info.format, offset, info.num_bytes)
    end, previous = 0, ""
    for info in sorted(tensors.values(), key=lambda info: info.offset):
        if info.offset < end:
            raise ModelFileError(path, f"tensors {shown(previous)} and {shown(info.name)} overlap")
        end, previous = info.offset + info.num_bytes, info.name
    return tensors
