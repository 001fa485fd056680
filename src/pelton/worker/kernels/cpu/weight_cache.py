"""Packed weights kept on disk: the next start maps them instead of repacking.

    header   at 0: magic, layout version, length of the file, place and SHA-256 of the index
    matrices from 4096 on, each at a multiple of 64, as native/packed_matrix.h describes them
    index    JSON: identity and path of the model, and for every matrix its format, shape and offset

A file appears by one rename of one that is complete and on disk, so only header and index are checked. Whatever
is not as expected (another model or version, a cut file, a folder that cannot be written) means: repack.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pelton.weights.packed_files import content_identity, packed_paths, remove_packed
from pelton.weights.tensors import ModelFiles
from pelton.worker.kernels.cpu import pelton_cpu
from pelton.worker.kernels.cpu.packed_weights import (
    ALIGNMENT,
    CollectedWeights,
    MappedWeights,
    PackedWeights,
    PlacedMatrix,
)

# Raised whenever native/packed_matrix.h or repack.cpp changes a byte of what is kept.
LAYOUT_VERSION = 2
# A smaller model is repacked before a file would be opened.
MIN_BYTES = 16 * 2**20
_MAGIC = b"PELTONWT"
_HEADER = struct.Struct("<8sIIQQ32s")  # magic, layout version, length of the index, its offset, length of the file
_DATA_START = 4096
_MAX_INDEX_BYTES = 64 * 2**20
# Pieces of this size come to lie in huge pages of the page cache, where the file system has them.
_PIECE_BYTES = 4 * 2**20
_IDLE = 19  # the lowest priority
_SPARE_BYTES = 256 * 2**20  # left free on the disk


@dataclass(frozen=True, slots=True)
class CacheKey:
    """Where the cache is, and what it must have been made from."""

    path: Path
    model: Path
    identity: str


@contextlib.contextmanager
def open_weight_cache(
    runtime: pelton_cpu.Runtime, files: ModelFiles, path: Path | None, min_bytes: int = MIN_BYTES
) -> Iterator[PackedWeights]:
    """Weights mapped from `path` where they are those of `files`, else a collection that is written there.

    Writing goes on in the background when the block is left.
    With no path, or for a model of less than `min_bytes`, nothing is read or written.
    """
    key = _try_key(path, files.path)
    mapped = try_map(runtime, key) if key is not None else None
    if mapped is not None:
        yield mapped
        if not mapped.is_complete and path is not None:
            path.unlink(missing_ok=True)
        return
    num_bytes = _max_packed_bytes(files)
    collected = CollectedWeights(runtime, pelton_cpu.WeightMemory(_DATA_START + num_bytes), _DATA_START)
    yield collected
    if key is not None and num_bytes >= min_bytes:
        # A daemon: an exit does not wait for it, and the next start finds no file rather than half of one.
        threading.Thread(target=_keep, args=(key, collected), name="pelton-weight-cache", daemon=True).start()


def _try_key(path: Path | None, model: Path) -> CacheKey | None:
    if path is None:
        return None
    try:
        return CacheKey(path, model, content_identity(model))
    except OSError:
        return None


def _max_packed_bytes(files: ModelFiles) -> int:
    tensors = [tensor for name in files.tensor_names() if len((tensor := files.tensor(name)).shape) == 2]
    return sum(PlacedMatrix.of(tensor).num_bytes + ALIGNMENT for tensor in tensors)


def try_map(runtime: pelton_cpu.Runtime, key: CacheKey) -> MappedWeights | None:
    """The weights kept at `key.path`, in the background copied from there, or None where they are another model's."""
    try:
        with key.path.open("rb", buffering=0) as file:
            num_bytes, index = _read_index(file)
            matrices = {name: PlacedMatrix(*place) for name, place in index["matrices"].items()}
            if index["identity"] != key.identity or not all(_lies_within(m, num_bytes) for m in matrices.values()):
                return None
            memory = pelton_cpu.WeightMemory.map(file.fileno(), num_bytes)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    threading.Thread(target=_copy, args=(memory,), name="pelton-weight-copy", daemon=True).start()
    return MappedWeights(runtime, memory, matrices)


def _copy(memory: pelton_cpu.WeightMemory) -> None:
    # Behind all else that a start has to do: until it is done, steps read the file.
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _IDLE)
    with contextlib.suppress(RuntimeError):  # no memory: the file serves as well, more slowly
        memory.copy_file()


def _lies_within(matrix: PlacedMatrix, num_bytes: int) -> bool:
    return matrix.offset >= _DATA_START and matrix.offset + matrix.num_bytes <= num_bytes


def _read_index(file: Any) -> tuple[int, dict[str, Any]]:
    """Length of the file and its index. Raises `ValueError` for a file that is not whole or not of this version."""
    header = file.read(_HEADER.size)
    if len(header) != _HEADER.size:
        raise ValueError("cut short")
    magic, version, index_bytes, index_offset, num_bytes, digest = _HEADER.unpack(header)
    if (magic, version) != (_MAGIC, LAYOUT_VERSION) or index_bytes > _MAX_INDEX_BYTES:
        raise ValueError("another version")
    if os.fstat(file.fileno()).st_size != num_bytes or index_offset + index_bytes != num_bytes:
        raise ValueError("cut short")
    file.seek(index_offset)
    text = file.read(index_bytes)
    if hashlib.sha256(text).digest() != digest:
        raise ValueError("the index is damaged")
    index: dict[str, Any] = json.loads(text)
    return num_bytes, index


def _keep(key: CacheKey, collected: CollectedWeights) -> None:
    """Write the collection to `key.path`, unless another process has meanwhile."""
    try:
        key.path.parent.mkdir(parents=True, exist_ok=True)
        with key.path.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if content_identity(key.model) != key.identity:
                return  # rewritten while it was read: nobody knows what was repacked
            if not _holds(key.path, _index(key, collected)):
                _write(key, collected)
                _remove_orphans(key.path.parent)
    except (OSError, RuntimeError) as error:
        import logging

        logging.getLogger("pelton.worker").warning("repacked weights are not kept: %s", error)


def _holds(path: Path, index: dict[str, Any]) -> bool:
    try:
        with path.open("rb", buffering=0) as file:
            return _read_index(file)[1] == index
    except (OSError, ValueError):
        return False


def _index(key: CacheKey, collected: CollectedWeights) -> dict[str, Any]:
    matrices = {name: list(matrix) for name, matrix in collected.matrices.items()}
    return {"identity": key.identity, "model": os.path.realpath(key.model), "matrices": matrices}


def _write(key: CacheKey, collected: CollectedWeights) -> None:
    """Raises `OSError` and leaves nothing behind. Call it with the lock held."""
    text = json.dumps(_index(key, collected)).encode()
    num_bytes = collected.end + len(text)
    if shutil.disk_usage(key.path.parent).free < num_bytes + _SPARE_BYTES:
        raise OSError(f"{num_bytes >> 20} MiB do not fit on the disk of {key.path.parent}")
    header = _HEADER.pack(_MAGIC, LAYOUT_VERSION, len(text), collected.end, num_bytes, hashlib.sha256(text).digest())
    ctypes.memmove(collected.memory.address, header, len(header))
    image = memoryview((ctypes.c_ubyte * collected.end).from_address(collected.memory.address))
    temporary = key.path.with_suffix(".tmp")
    try:
        with temporary.open("wb", buffering=0) as file:
            for start in range(0, len(image), _PIECE_BYTES):
                _write_all(file.fileno(), image[start : start + _PIECE_BYTES])
            _write_all(file.fileno(), memoryview(text))
            os.fsync(file.fileno())
        temporary.replace(key.path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_all(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]


def _remove_orphans(folder: Path) -> None:
    """Delete what is kept for models that are no more."""
    for path in packed_paths(folder):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), path.open("rb", buffering=0) as file:
            model = Path(_read_index(file)[1]["model"])
            if not model.exists():
                remove_packed(folder, model)
