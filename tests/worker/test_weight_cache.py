"""Packed weights on disk: what is mapped is what would be repacked, and no file or disk keeps a model from loading."""

from __future__ import annotations

import ctypes
import hashlib
import json
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest

from pelton.weights.gguf.formats import FORMATS
from pelton.weights.model_files import open_model
from pelton.weights.packed_files import content_identity, packed_path
from pelton.weights.tensors import ModelFiles
from pelton.worker.kernels.cpu import pelton_cpu, weight_cache
from pelton.worker.kernels.cpu.backend import NativeKernels
from pelton.worker.kernels.cpu.packed_weights import MappedWeights, PackedWeights
from pelton.worker.kernels.cpu.weight_cache import CacheKey, open_weight_cache, try_map
from tests.weights.make_models import TINY_CONFIGS, random_tensors, write_gguf

CONFIG = {**TINY_CONFIGS["qwen2"], "hidden_size": 256, "intermediate_size": 512}
RUNTIME = pelton_cpu.Runtime(None, 2, [])
Results = dict[str, bytes]


def write_model(path: Path, seed: int = 0) -> Path:
    tensors = random_tensors(CONFIG, seed)
    return write_gguf(path, CONFIG, tensors, quantized=gguf.GGMLQuantizationType.Q5_0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.gguf")


def load_into(weights: PackedWeights, files: ModelFiles) -> dict[str, pelton_cpu.LinearWeight]:
    matrices = {}
    for name in files.tensor_names():
        tensor = files.tensor(name)
        if len(tensor.shape) == 2:
            matrices[name] = pelton_cpu.LinearWeight(tensor.shape[1])
            weights.add_to(matrices[name], tensor)
    return matrices


def products(matrices: dict[str, pelton_cpu.LinearWeight]) -> Results:
    results = {}
    for name, weight in matrices.items():
        x = np.random.default_rng(0).standard_normal((3, weight.num_inputs), dtype=np.float32)
        out = np.empty((3, weight.num_outputs), np.float32)
        RUNTIME.linear(weight, x.ctypes.data, 3, 0, out.ctypes.data)
        results[name] = out.tobytes()
    return results


def wait_for_writers() -> None:
    for thread in threading.enumerate():
        if thread.name == "pelton-weight-cache":
            thread.join()


def start(model: Path, path: Path) -> tuple[Results, bool]:
    """What the products are after a start, and whether it mapped its weights."""
    files = open_model(model)
    with open_weight_cache(RUNTIME, files, path, min_bytes=0) as weights:
        matrices = load_into(weights, files)
    wait_for_writers()
    return products(matrices), isinstance(weights, MappedWeights)


def fresh(model: Path) -> Results:
    return products(load_into(PackedWeights(RUNTIME), open_model(model)))


def key_of(model: Path, path: Path) -> CacheKey:
    return CacheKey(path, model, content_identity(model))


def test_the_second_start_maps_what_the_first_repacked(model: Path, tmp_path: Path) -> None:
    path = packed_path(tmp_path / "cache", model)
    results = fresh(model)
    assert start(model, path) == (results, False)
    assert start(model, path) == (results, True)
    assert path.stat().st_size > 0
    assert [each.suffix for each in sorted(path.parent.iterdir())] == [".lock", ".weights"]


@pytest.mark.parametrize("format_name", pelton_cpu.FORMATS)
def test_kept_bytes_are_those_of_a_fresh_repack(format_name: str, tmp_path: Path) -> None:
    """The whole memory, byte for byte, with rows that do not fill a panel."""
    layout = FORMATS[format_name]
    num_outputs, num_inputs = 45, 512
    num_blocks = num_outputs * num_inputs // layout.block_size
    blocks = np.random.default_rng(0).integers(0, 256, num_blocks * layout.block_bytes, np.uint8)
    num_bytes = pelton_cpu.packed_num_bytes(format_name, num_outputs, num_inputs)
    images = []
    for _ in range(2):
        memory = pelton_cpu.WeightMemory(num_bytes)
        weight = pelton_cpu.LinearWeight(num_inputs)
        weight.add(RUNTIME, format_name, num_outputs, blocks.ctypes.data, blocks.nbytes, memory, 0)
        images.append(ctypes.string_at(memory.address, num_bytes))
    path = tmp_path / "image"
    path.write_bytes(images[0])
    with path.open("rb") as file:
        mapped = pelton_cpu.WeightMemory.map(file.fileno(), num_bytes)
    for _ in range(2):
        assert ctypes.string_at(mapped.address, num_bytes) == images[0] == images[1]
        mapped.copy_file()
        assert mapped.num_mapped_bytes == 0


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def overwrite(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def move_a_matrix(path: Path) -> None:
    """An index whose checksum is right, but that points past the end."""
    content = path.read_bytes()
    magic, version, index_bytes, offset, _, _ = weight_cache._HEADER.unpack_from(content)
    index = json.loads(content[offset : offset + index_bytes])
    index["matrices"]["model.layers.0.mlp.up_proj.weight"][3] = offset
    text = json.dumps(index).encode()
    digest = hashlib.sha256(text).digest()
    header = weight_cache._HEADER.pack(magic, version, len(text), offset, offset + len(text), digest)
    path.write_bytes(header + content[len(header) : offset] + text)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: cut(path, 0),
    "cut in the header": lambda path: cut(path, 20),
    "cut in the matrices": lambda path: cut(path, 10_000),
    "cut in the index": lambda path: cut(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "another kind of file": lambda path: overwrite(path, 0, b"GGUF"),
    "another layout": lambda path: overwrite(path, 8, b"\xff"),
    "damaged index": lambda path: overwrite(path, path.stat().st_size - 20, b"?"),
    "huge index": lambda path: overwrite(path, 12, b"\xff\xff\xff\xff"),
    "index out of bounds": move_a_matrix,
    "not text": lambda path: path.write_bytes(bytes(1000)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_replaced(model: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.weights"
    results, _ = start(model, path)
    DAMAGE[damage](path)
    assert try_map(RUNTIME, key_of(model, path)) is None
    assert start(model, path) == (results, False)
    assert start(model, path) == (results, True)


def test_another_models_weights_are_not_used(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.weights"
    before, _ = start(model, path)
    write_model(model, seed=1)
    after = fresh(model)
    assert after != before
    assert start(model, path) == (after, False)
    assert start(model, path) == (after, True)


def test_a_model_that_needs_more_than_is_kept_loads_and_drops_the_file(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.weights"
    files = open_model(model)
    with open_weight_cache(RUNTIME, files, path, min_bytes=0) as weights:
        tensor = files.tensor("model.embed_tokens.weight")
        weights.add_to(pelton_cpu.LinearWeight(tensor.shape[1]), tensor)
    wait_for_writers()
    assert start(model, path) == (fresh(model), True)
    assert not path.exists()
    assert start(model, path) == (fresh(model), False)
    assert path.exists()


def in_the_place_of_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("no folder")
    return tmp_path / "file" / "model.weights"


def in_the_place_of_a_folder(tmp_path: Path) -> Path:
    (tmp_path / "model.weights").mkdir()
    return tmp_path / "model.weights"


@pytest.mark.parametrize(
    "make_path", [in_the_place_of_a_file, in_the_place_of_a_folder, lambda _: Path("/proc/pelton/model.weights")]
)
def test_where_nothing_can_be_written_the_model_loads(
    model: Path, tmp_path: Path, make_path: Callable[[Path], Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = make_path(tmp_path)
    for _ in range(2):
        assert start(model, path) == (fresh(model), False)
    assert "repacked weights are not kept" in caplog.text
    assert not path.is_file()


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cache" / "model.weights"
    with largest_file(100_000):
        assert start(model, path) == (fresh(model), False)
    assert "repacked weights are not kept" in caplog.text
    assert [each.suffix for each in path.parent.iterdir()] == [".lock"]
    assert start(model, path) == (fresh(model), False)
    assert start(model, path) == (fresh(model), True)


def test_a_disk_with_little_room_is_left_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(weight_cache, "_SPARE_BYTES", 1 << 62)
    assert start(model, tmp_path / "model.weights") == (fresh(model), False)
    assert "do not fit on the disk" in caplog.text


def test_two_processes_race(model: Path, tmp_path: Path) -> None:
    """Both load; one of them writes, and a third maps that."""
    path = tmp_path / "cache" / "model.weights"
    command = [sys.executable, "-c", RACER, str(model), str(path)]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    answers = [racer.communicate(timeout=60)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert answers[0] == answers[1]
    assert sorted(each.suffix for each in path.parent.iterdir()) == [".lock", ".weights"]
    assert start(model, path) == (fresh(model), True)


RACER = """
import hashlib, sys
from pathlib import Path
from pelton.weights.model_files import open_model
from pelton.worker.kernels.cpu.weight_cache import open_weight_cache
from tests.worker.test_weight_cache import RUNTIME, load_into, products, wait_for_writers
print("ready", flush=True)
sys.stdin.readline()
files = open_model(Path(sys.argv[1]))
with open_weight_cache(RUNTIME, files, Path(sys.argv[2]), min_bytes=0) as weights:
    matrices = load_into(weights, files)
wait_for_writers()
digest = hashlib.sha256(b"".join(products(matrices).values())).hexdigest()
print(digest)
"""


def test_copies_take_the_files_place_under_readers(tmp_path: Path) -> None:
    """Several pieces, the last of which ends within a page."""
    image = np.random.default_rng(0).integers(0, 256, (40 << 20) + 5, np.uint8).tobytes()
    path = tmp_path / "image"
    path.write_bytes(image)
    with path.open("rb") as file:
        memory = pelton_cpu.WeightMemory.map(file.fileno(), len(image))
    assert memory.num_mapped_bytes == len(image)
    assert str(path) in Path("/proc/self/maps").read_text()
    copier = threading.Thread(target=memory.copy_file)
    copier.start()
    while copier.is_alive():
        assert ctypes.string_at(memory.address, len(image)) == image
    assert ctypes.string_at(memory.address, len(image)) == image
    assert memory.num_mapped_bytes == 0
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_what_is_not_copied_yet_is_promised(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.weights"
    start(model, path)
    monkeypatch.setattr(weight_cache, "_copy", lambda _: None)
    kernels = NativeKernels(1)
    monkeypatch.setattr(weight_cache, "MIN_BYTES", 0)
    with kernels.weight_cache(open_model(model), path):
        assert kernels.num_promised_bytes() == 0
    assert kernels.num_promised_bytes() == path.stat().st_size


def test_what_is_kept_for_lost_models_is_removed(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    lost = write_model(tmp_path / "lost.gguf")
    start(lost, packed_path(cache, lost))
    start(model, packed_path(cache, model))
    assert packed_path(cache, lost).exists()
    lost.unlink()
    write_model(model, seed=1)
    start(model, packed_path(cache, model))
    assert not packed_path(cache, lost).exists()
    assert packed_path(cache, model).exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(path.read_bytes()),
        lambda path: path.chmod(0o600),
        lambda path: overwrite(path, 5000, b"?"),
    ],
)
def test_whatever_is_done_to_a_file_changes_its_identity(model: Path, change: Callable[[Path], None]) -> None:
    before = content_identity(model)
    assert content_identity(model) == before
    change(model)
    assert content_identity(model) != before


def test_a_path_has_one_file_whatever_its_spelling(model: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    assert packed_path(tmp_path, link) == packed_path(tmp_path, model)
    assert packed_path(tmp_path, model) != packed_path(tmp_path, tmp_path / "other" / "model.gguf")


def test_small_models_are_repacked_each_time(model: Path, tmp_path: Path) -> None:
    files = open_model(model)
    with open_weight_cache(RUNTIME, files, tmp_path / "model.weights") as weights:
        load_into(weights, files)
    wait_for_writers()
    assert not (tmp_path / "model.weights").exists()


def test_nothing_outside_the_memory_is_used() -> None:
    memory = pelton_cpu.WeightMemory(1 << 21)
    weight = pelton_cpu.LinearWeight(256)
    num_bytes = pelton_cpu.packed_num_bytes("Q8_0", 32, 256)
    for offset in (1, memory.num_bytes - num_bytes + 64, 1 << 40):
        with pytest.raises(IndexError):
            weight.add_packed("Q8_0", 32, memory, offset)
    with pytest.raises(ValueError, match="multiple"):
        weight.add_packed("Q8_0", 0, memory, 0)
    assert weight.num_outputs == 0
