"""safetensors container: one file, or shards named by an index.

Layout: u64 header length, JSON header, data. The header maps a name to dtype, shape and the half-open
byte range of its data (github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from pelton.core.errors import ModelFileError, UnsupportedModelError
from pelton.weights.mapped_file import drop_pages, map_file, parse_json_object, read_json_object, shown
from pelton.weights.tensors import WeightTensor

if TYPE_CHECKING:
    import numpy.typing as npt

MAX_HEADER_BYTES = 64 * 2**20
MAX_DIMENSIONS = 8
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# dtype -> bytes per element; the format's types below 8 bits are refused.
_DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
}
_READABLE_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class SafetensorsInfo:
    """`offset` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class SafetensorsFile:
    """One opened file, checked on opening. Raises `ModelFileError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = map_file(path)
        header, data_start = _read_header(path, self._data)
        header.pop("__metadata__", None)
        self.tensors = {name: _read_info(path, name, entry, data_start) for name, entry in header.items()}
        _check_layout(path, self.tensors, data_start, len(self._data))

    def tensor(self, name: str) -> WeightTensor:
        """Raises `UnsupportedModelError` for a dtype that is not a plain float."""
        tensor = self.part(name)
        if tensor.format not in _READABLE_DTYPES:
            raise UnsupportedModelError(
                f"{self.path}: tensor {shown(name)} is stored as {tensor.format}; "
                f"supported are {', '.join(_READABLE_DTYPES)}"
            )
        return tensor

    def part(self, name: str) -> WeightTensor:
        """A tensor of any dtype, named as its format."""
        import numpy as np

        info = self.tensors[name]
        data: npt.NDArray[np.uint8] = np.frombuffer(
            self._data, dtype=np.uint8, count=info.num_bytes, offset=info.offset
        )
        return WeightTensor(name, info.shape, info.dtype, data)

    def drop_pages(self) -> None:
        """See `ModelFiles.drop_pages`."""
        drop_pages(self._data)


def holds_safetensors(folder: Path) -> bool:
    return (folder / SINGLE_FILE).exists() or (folder / INDEX_FILE).exists()


def open_safetensors_folder(folder: Path) -> dict[str, SafetensorsFile]:
    """Tensor name -> the opened file that holds it."""
    index = folder / INDEX_FILE
    single = folder / SINGLE_FILE
    if single.exists():
        file = SafetensorsFile(single)
        return dict.fromkeys(file.tensors, file)
    if index.exists():
        return _open_shards(index)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ModelFileError(
            folder,
            "holds only pickled weights (.bin or .pt), which can run code and are never loaded; "
            f"convert them to {SINGLE_FILE}",
        )
    raise ModelFileError(folder, f"holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def _open_shards(index: Path) -> dict[str, SafetensorsFile]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(index, "weight_map is missing or empty")
    files: dict[str, SafetensorsFile] = {}
    placed: dict[str, SafetensorsFile] = {}
    for tensor_name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not _is_plain_name(file_name):
            raise ModelFileError(
                index, f"{shown(file_name)} is not the plain name of a .safetensors file in the same folder"
            )
        if file_name not in files:
            path = index.parent / file_name
            if not path.exists():
                raise ModelFileError(index, f"shard {shown(file_name)} is missing from the folder")
            files[file_name] = SafetensorsFile(path)
        if tensor_name not in files[file_name].tensors:
            raise ModelFileError(
                index, f"tensor {shown(tensor_name)} is not in {shown(file_name)}, where the index places it"
            )
        placed[tensor_name] = files[file_name]
    return placed


def _is_plain_name(file_name: str) -> bool:
    return file_name.endswith(".safetensors") and not set(file_name) & set("/\\:\0") and not file_name.startswith(".")


def _read_header(path: Path, data: mmap.mmap) -> tuple[dict[str, Any], int]:
    """Returns the header and where the data begins."""
    if len(data) < 8:
        raise ModelFileError(path, f"truncated: {len(data)} bytes hold no safetensors header")
    num_bytes = struct.unpack_from("<Q", data)[0]
    if num_bytes > MAX_HEADER_BYTES or num_bytes > len(data) - 8:
        raise ModelFileError(
            path,
            f"truncated or not safetensors: it claims a header of {num_bytes} bytes, the file has {len(data) - 8} left",
        )
    try:
        text = data[8 : 8 + num_bytes].decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileError(path, "the header is not valid UTF-8") from error

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name occurs twice in one object")
        return result

    return parse_json_object(path, text, unique), 8 + num_bytes


def _read_info(path: Path, name: str, entry: Any, data_start: int) -> SafetensorsInfo:
    problem = f"header entry of tensor {shown(name)}"
    if not isinstance(entry, dict):
        raise ModelFileError(path, f"{problem} is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise ModelFileError(path, f"{problem} has unknown dtype {shown(dtype)}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ModelFileError(path, f"{problem} has no valid shape (at most {MAX_DIMENSIONS} sizes, none negative)")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelFileError(path, f"{problem} has no valid data_offsets (begin and end)")
    num_bytes = _DTYPE_BYTES[dtype]
    for size in shape:
        num_bytes *= size
    if num_bytes != offsets[1] - offsets[0]:
        raise ModelFileError(
            path, f"tensor {shown(name)} spans {offsets[1] - offsets[0]} bytes; {dtype} {shape} needs {num_bytes}"
        )
    return SafetensorsInfo(dtype, tuple(shape), data_start + offsets[0], num_bytes)


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)


def _check_layout(path: Path, tensors: Mapping[str, SafetensorsInfo], data_start: int, file_size: int) -> None:
    """Tensors must fill the data exactly: no overlap, no gap, nothing past the end."""
    end, previous = data_start, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if info.offset != end:
            problem = "overlap" if info.offset < end else f"leave {info.offset - end} bytes unused between them"
            raise ModelFileError(path, f"{previous} and tensor {shown(name)} {problem}")
        end, previous = info.offset + info.num_bytes, f"tensor {shown(name)}"
    if end != file_size:
        kind = "truncated" if end > file_size else "has unknown data at its end"
        raise ModelFileError(path, f"{kind}: its tensors end at byte {end}, the file at {file_size}")
