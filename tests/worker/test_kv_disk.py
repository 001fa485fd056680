"""Blocks on disk: whole or a miss, whatever happens to files and folders."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pelton.core.errors import ConfigError
from pelton.worker import kv_disk
from pelton.worker.kv_disk import DiskStore

BLOCK_BYTES = 5000
KEY = (0, b"0123456789abcdef")
OTHER = (1, b"fedcba9876543210")


class Host:
    def __init__(self) -> None:
        self.blocks = [bytearray(os.urandom(BLOCK_BYTES)) for _ in range(4)]

    def block(self, slot_id: int) -> memoryview:
        return memoryview(self.blocks[slot_id])


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def store(tmp_path: Path, host: Host) -> Iterator[DiskStore]:
    store = open_store(tmp_path, host)
    yield store
    store.close()


def open_store(folder: Path, host: Host, identity: str = "model") -> DiskStore:
    return DiskStore(folder, identity, BLOCK_BYTES, host.block)


def block_file(folder: Path) -> Path:
    (path,) = folder.rglob("*.kv")
    return path


def test_a_block_comes_back_to_the_byte_also_after_a_restart(tmp_path: Path, store: DiskStore, host: Host) -> None:
    assert store.store(1, KEY).result()
    assert store.load([2, 3], [KEY, OTHER]).result().loaded == (True, False)
    assert host.blocks[2] == host.blocks[1] != host.blocks[3]
    again = open_store(tmp_path, host)
    assert again.scan(10**9) == [KEY]
    assert again.load([3], [KEY]).result().loaded == (True,)
    assert host.blocks[3] == host.blocks[1]
    assert store.file_bytes == block_file(tmp_path).stat().st_size
    again.close()


def test_only_this_user_may_read(tmp_path: Path, store: DiskStore) -> None:
    assert store.store(1, KEY).result()
    path = block_file(tmp_path)
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def flip(offset: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.write_bytes(data)

    change.__name__ = f"flip_{offset}"
    return change


def fill_with_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_link(path: Path) -> None:
    path.rename(path.with_suffix(".other"))
    path.symlink_to(path.with_suffix(".other"))


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def remove(path: Path) -> None:
    path.unlink()


DAMAGES = [cut, extend, empty, cut_header, fill_with_zeros, make_folder, make_link, make_pipe, remove]
DAMAGES += [flip(offset) for offset in (0, 8, 12, 16, 32, 48, 56, 88, -1)]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_a_miss(tmp_path: Path, store: DiskStore, host: Host, damage: Callable[[Path], None]) -> None:
    assert store.store(1, KEY).result()
    damage(block_file(tmp_path))
    assert store.load([2], [KEY]).result(timeout=10).loaded == (False,)
    again = open_store(tmp_path, host)
    again.scan(10**9)
    assert again.load([2], [KEY]).result(timeout=10).loaded == (False,)
    if damage is not make_folder:
        assert again.store(1, KEY).result()
        assert again.load([2], [KEY]).result().loaded == (True,)
    again.close()


def test_a_block_of_another_model_or_under_another_name_is_a_miss(tmp_path: Path, store: DiskStore, host: Host) -> None:
    assert store.store(1, KEY).result()
    other = open_store(tmp_path, host, "another model")
    assert other.scan(10**9) == []
    assert other.load([2], [KEY]).result().loaded == (False,)
    path = block_file(tmp_path)
    os.link(path, other._path(KEY))
    assert other.load([2], [KEY]).result().loaded == (False,), "another model's block in this one's place"
    os.link(path, store._path(OTHER))
    assert store.load([2], [OTHER]).result().loaded == (False,), "a block under another's name"
    assert store.load([2], [KEY]).result().loaded == (True,)
    other.close()


def test_foreign_files_are_left_alone(tmp_path: Path, host: Host) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.kv").write_text("mine")
    store = open_store(tmp_path, host)
    (store._folder / "00" / "notes.txt").write_text("mine")
    assert store.scan(0) == []
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 3
    store.close()


def test_a_scan_gives_the_oldest_first_and_makes_room_among_other_models(tmp_path: Path, host: Host) -> None:
    keys = [(0, bytes([i] * 16)) for i in (9, 3, 7, 5)]
    old = open_store(tmp_path, host, "old model")
    for key in keys:
        assert old.store(1, key).result()
        os.utime(old._path(key), (1000 + key[1][0], 1000 + key[1][0]))
    assert [key[1][0] for key in old.scan(10**9)] == [3, 5, 7, 9]
    new = open_store(tmp_path, host, "new model")
    assert new.store(1, KEY).result()
    assert new.scan(3 * new.file_bytes) == [KEY]
    assert [key[1][0] for key in old.scan(10**9)] == [7, 9]
    old.close()
    new.close()


def test_use_is_remembered_over_a_restart(store: DiskStore) -> None:
    for key, when in ((KEY, 1000), (OTHER, 2000)):
        assert store.store(1, key).result()
        os.utime(store._path(key), (when, when))
    assert store.scan(10**9) == [KEY, OTHER]
    assert store.load([2], [KEY]).result().loaded == (True,)
    assert store.scan(10**9) == [OTHER, KEY]


def test_a_file_size_limit_stops_writing_for_a_while_and_says_so_once(
    tmp_path: Path, host: Host, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a full disk does too: the write fails half way."""
    import resource

    store = open_store(tmp_path, host)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK_BYTES // 2, limits[1]))
    try:
        assert not store.store(1, KEY).result()
        assert not store.store(1, OTHER).result()
        monkeypatch.setattr(kv_disk, "PAUSE_S", 0.0)
        store._paused_until_s = 0.0
        assert not store.store(1, KEY).result()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capfd.readouterr().err.count("cannot be written") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "half a file was left behind"
    assert store.store(1, KEY).result()
    assert store.load([2], [KEY]).result().loaded == (True,)
    store.close()


def test_a_folder_that_goes_away_is_misses_and_failed_writes(tmp_path: Path, store: DiskStore) -> None:
    assert store.store(1, KEY).result()
    tmp_path.rename(tmp_path.with_suffix(".gone"))
    assert store.load([2], [KEY]).result().loaded == (False,)
    assert not store.store(1, KEY).result()
    store.remove([KEY])
    tmp_path.with_suffix(".gone").rename(tmp_path)


def test_a_folder_that_cannot_be_made_is_a_typed_error(tmp_path: Path, host: Host) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"disk_kv_cache_dir: .* cannot be written"):
        open_store(tmp_path / "file" / "below", host)


def test_after_close_nothing_is_moved(tmp_path: Path, host: Host) -> None:
    store = open_store(tmp_path, host)
    store.close()
    store.close()


WRITER = """
import os, sys
from pathlib import Path
from pelton.worker.kv_disk import DiskStore
block = bytearray(os.urandom(1 << 20))
store = DiskStore(Path(sys.argv[1]), "model", len(block), lambda slot_id: memoryview(block))
print("ready", flush=True)
index = 0
while True:
    store.store(1, (0, index.to_bytes(16, "big"))).result()
    index += 1
"""


def test_a_writer_that_is_killed_leaves_whole_files_and_nothing_else(tmp_path: Path) -> None:
    block = bytearray(1 << 20)
    for round in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(0.05 + 0.02 * round)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        store = DiskStore(tmp_path, "model", len(block), lambda _: memoryview(block))
        keys = store.scan(10**12)
        assert keys
        assert all(store.load([1] * len(keys), keys).result().loaded)
        assert not list(tmp_path.rglob("*.tmp"))
        store.close()
