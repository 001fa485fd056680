"""`DiskStore`: KV blocks in files that outlive the process, one file a block, named by their content's hash.

    <folder>/<identity of model and layout>/<first byte of the hash>/<hash>-<group>.kv
    header  magic, version, group, identity, hash, length and SHA-256 of what follows
    bytes   as the block lies in host memory

A file appears whole or not at all, by one rename. Nothing is synced: after a crash of the machine a file may
be damaged. A file that is missing, cut, damaged or another's is a miss, never an error and never data: its bytes
are in a host block that nobody finds until all of it has been checked. Several servers may share a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pelton.core.batch import BlockKey
from pelton.core.errors import ConfigError
from pelton.core.protocols import BlockRead

VERSION = 1
NUM_READERS = 2
# After a write has failed (a full disk, say) none is tried for so long.
PAUSE_S = 10.0
_MAGIC = b"PELTONKV"
_HEADER = struct.Struct("<8sII16s16sQ32s")
_FILE_NAME = re.compile(r"([0-9a-f]{32})-(\d{1,6})\.kv")
_TEMPORARY_NAME = re.compile(r"[0-9a-f]{32}-\d{1,6}\.(\d+)\.tmp")
_FOLDER_NAME = re.compile(r"[0-9a-f]{32}")
_STALE_S = 3600.0  # a file that somebody is still writing is younger


class DiskStore:
    """Implements `core.protocols.BlockStore`. `host_block` gives the bytes of a block in host memory."""

    def __init__(self, folder: Path, identity: str, block_bytes: int, host_block: Callable[[int], memoryview]) -> None:
        """Raises `ConfigError` where the folder cannot be made or written."""
        self.block_bytes = block_bytes
        self._identity = hashlib.blake2b(identity.encode(), digest_size=16).digest()
        self._root = folder
        self._folder = folder / self._identity.hex()
        self._host_block = host_block
        self._paused_until_s = 0.0
        self._has_complained = False
        self._closed = threading.Event()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for first in range(256):
                (self._folder / f"{first:02x}").mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"disk_kv_cache_dir: {folder} cannot be written: {error}") from error
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="pelton-kv-write")
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="pelton-kv-read")

    @property
    def file_bytes(self) -> int:
        return _HEADER.size + self.block_bytes

    def scan(self, max_bytes: int) -> list[BlockKey]:
        """Keys of the files that are there, oldest first. Deletes what killed writers left, and of other
        models and layouts the oldest blocks, until all of it takes at most `max_bytes`."""
        own: list[tuple[float, BlockKey]] = []
        others: list[tuple[float, int, str]] = []
        for folder in sorted(self._root.iterdir()):
            if not _FOLDER_NAME.fullmatch(folder.name) or folder.is_symlink():
                continue
            for entry, status in _files_below(folder):
                match = _FILE_NAME.fullmatch(entry.name)
                if match is None:
                    _remove_if_stale(entry, status)
                elif folder != self._folder:
                    others.append((status.st_mtime, status.st_size, entry.path))
                elif status.st_size == self.file_bytes:
                    own.append((status.st_mtime, (int(match[2]), bytes.fromhex(match[1]))))
                else:
                    _unlink(entry.path)
        excess = sum(size for _, size, _ in others) + len(own) * self.file_bytes - max_bytes
        for _, size, path in sorted(others):
            if excess <= 0:
                break
            _unlink(path)
            excess -= size
        return [key for _, key in sorted(own)]

    def store(self, slot_id: int, key: BlockKey) -> Future[bool]:
        return self._writer.submit(self._store, slot_id, key)

    def load(self, slot_ids: Sequence[int], keys: Sequence[BlockKey]) -> Future[BlockRead]:
        return self._readers.submit(self._load, slot_ids, keys)

    def remove(self, keys: Sequence[BlockKey]) -> None:
        self._writer.submit(self._remove, keys)

    def _remove(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            _unlink(self._path(key))

    def close(self) -> None:
        """End what is being moved; what waits is dropped."""
        self._closed.set()
        self._writer.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)

    def _path(self, key: BlockKey) -> Path:
        name = key[1].hex()
        return self._folder / name[:2] / f"{name}-{key[0]}.kv"

    def _store(self, slot_id: int, key: BlockKey) -> bool:
        if self._closed.is_set() or time.monotonic() < self._paused_until_s:
            return False
        path = self._path(key)
        block = self._host_block(slot_id)
        digest = hashlib.sha256(block).digest()
        header = _HEADER.pack(_MAGIC, VERSION, key[0], self._identity, key[1], block.nbytes, digest)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                _write_all(file, header, block)
            finally:
                os.close(file)
            os.replace(temporary, path)
        except OSError as error:
            _unlink(temporary)
            self._pause(error)
            return False
        self._has_complained = False
        return True

    def _pause(self, error: OSError) -> None:
        self._paused_until_s = time.monotonic() + PAUSE_S
        if not self._has_complained:
            self._has_complained = True
            print(
                f"pelton: KV blocks cannot be written to {self._folder}: {error.strerror or error}; "
                f"tried again every {PAUSE_S:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    def _load(self, slot_ids: Sequence[int], keys: Sequence[BlockKey]) -> BlockRead:
        start_s = time.perf_counter()
        loaded = tuple(self._try_load(slot_id, key) for slot_id, key in zip(slot_ids, keys, strict=True))
        return BlockRead(loaded, time.perf_counter() - start_s)

    def _try_load(self, slot_id: int, key: BlockKey) -> bool:
        path = self._path(key)
        block = self._host_block(slot_id)
        try:
            # Without waiting for anybody: it may be a pipe.
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            header = bytearray(_HEADER.size)
            is_whole = os.readv(file, [header, block, bytearray(1)]) == self.file_bytes
        except OSError:
            return False
        finally:
            os.close(file)
        expected = (_MAGIC, VERSION, key[0], self._identity, key[1], block.nbytes)
        *found, digest = _HEADER.unpack(header)
        if not is_whole or tuple(found) != expected or hashlib.sha256(block).digest() != digest:
            _unlink(path)
            return False
        with contextlib.suppress(OSError):
            os.utime(path)  # used now: a restart gives up the oldest first
        return True


def _write_all(file: int, *parts: bytes | memoryview) -> None:
    for part in parts:
        rest = memoryview(part)
        while len(rest):
            rest = rest[os.write(file, rest) :]


def _files_below(folder: Path) -> list[tuple[os.DirEntry[str], os.stat_result]]:
    """Regular files two levels down; what vanishes meanwhile, or cannot be read, is left out."""
    found = []
    for first in sorted(folder.iterdir()):
        with contextlib.suppress(OSError), os.scandir(first) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_file(follow_symlinks=False):
                        found.append((entry, entry.stat(follow_symlinks=False)))
    return found


def _remove_if_stale(entry: os.DirEntry[str], status: os.stat_result) -> None:
    match = _TEMPORARY_NAME.fullmatch(entry.name)
    if match is None:
        return
    if time.time() - status.st_mtime > _STALE_S or not _is_alive(int(match[1])):
        _unlink(entry.path)


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return process_id != os.getpid()


def _unlink(path: str | Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
