"""Random damage to good files: a typed error or a model, never another exception or a large allocation."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pelton.core.errors import ModelFileError, UnsupportedModelError
from pelton.weights.dequantize import dequantize
from pelton.weights.gguf.reader import read_gguf
from pelton.weights.model_files import open_model
from tests.weights.make_models import TINY_CONFIGS, random_tensors, write_folder, write_gguf

TYPED_ERRORS = (ModelFileError, UnsupportedModelError)
# Work on a damaged file may not exceed this many times the file's size.
MEMORY_FACTOR = 40
fuzzing = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

INTERESTING = [0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
positions = st.floats(0, 1, exclude_max=True)
# (where, how many bytes, what to write there)
patches = st.lists(
    st.tuples(
        positions, st.sampled_from([1, 2, 4, 8]), st.one_of(st.sampled_from(INTERESTING), st.integers(0, 2**64 - 1))
    ),
    min_size=1,
    max_size=4,
)


def damage(content: bytes, changes: list[tuple[float, int, int]], head: int) -> bytes:
    """Overwrite little-endian integers in the first `head` bytes, where the structure is."""
    damaged = bytearray(content)
    for where, num_bytes, value in changes:
        start = int(where * max(1, min(head, len(content)) - num_bytes))
        damaged[start : start + num_bytes] = (value % 256**num_bytes).to_bytes(num_bytes, "little")
    return bytes(damaged)


def use(path: Path) -> None:
    """Read everything that can be read."""
    with contextlib.suppress(*TYPED_ERRORS):
        files = open_model(path)
        for name in files.tensor_names():
            dequantize(files.tensor(name), num_threads=1)


def use_bounded(path: Path, size: int) -> None:
    tracemalloc.start()
    try:
        use(path)
        assert tracemalloc.get_traced_memory()[1] < MEMORY_FACTOR * size + 2_000_000
    finally:
        tracemalloc.stop()


def use_metadata(path: Path) -> None:
    with contextlib.suppress(*TYPED_ERRORS):
        dict(read_gguf(path).metadata)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def good_gguf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    config = {**TINY_CONFIGS[request.param], "num_hidden_layers": 1}
    path = tmp_path_factory.mktemp("good") / "model.gguf"
    metadata = {"tokenizer.chat_template": "{{ messages }}", "general.sampling.top_k": 5}
    quantized = gguf.GGMLQuantizationType.Q8_0
    return write_gguf(path, config, random_tensors(config), quantized=quantized, metadata=metadata).read_bytes()


def directory_size(content: bytes, path: Path) -> int:
    path.write_bytes(content)
    return min(info.offset for info in read_gguf(path).tensors.values())


@fuzzing
@given(changes=patches)
def test_damaged_gguf(good_gguf: bytes, tmp_path: Path, changes: list[tuple[float, int, int]]) -> None:
    path = tmp_path / "model.gguf"
    head = directory_size(good_gguf, path)
    path.write_bytes(damage(good_gguf, changes, head))
    use_bounded(path, len(good_gguf))
    use_metadata(path)


@fuzzing
@given(where=positions)
def test_truncated_gguf(good_gguf: bytes, tmp_path: Path, where: float) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(good_gguf[: int(where * len(good_gguf))])
    with pytest.raises(ModelFileError):
        open_model(path)


@fuzzing
@given(content=st.binary(max_size=200))
def test_noise_after_the_magic(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + content)
    with pytest.raises(TYPED_ERRORS):
        open_model(path)


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {**TINY_CONFIGS["qwen2"], "num_hidden_layers": 1}
    folder = write_folder(tmp_path_factory.mktemp("good") / "folder", config, random_tensors(config))
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 5, "temperature": 0.7, "eos_token_id": [1]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return folder


@pytest.fixture
def in_copy(good_folder: Path, tmp_path: Path) -> Callable[[str, bytes], Path]:
    """A copy of the folder with one file's content replaced."""

    def copy(name: str, content: bytes) -> Path:
        for file in good_folder.iterdir():
            (tmp_path / file.name).write_bytes(content if file.name == name else file.read_bytes())
        return tmp_path

    return copy


@fuzzing
@given(changes=patches, where=positions, truncate=st.booleans())
def test_damaged_safetensors(
    good_folder: Path,
    in_copy: Callable[[str, bytes], Path],
    changes: list[tuple[float, int, int]],
    where: float,
    truncate: bool,
) -> None:
    content = (good_folder / "model.safetensors").read_bytes()
    head = 8 + int.from_bytes(content[:8], "little")
    content = content[: int(where * len(content))] if truncate else damage(content, changes, head)
    use_bounded(in_copy("model.safetensors", content), len(content))


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
OTHER_KEYS = ("rope_scaling", "rope_parameters", "layer_types", "text_config", "quantization_config", "head_dim")


@fuzzing
@given(data=st.data(), file_name=st.sampled_from(["config.json", "generation_config.json", "tokenizer_config.json"]))
def test_strange_values_in_json(
    good_folder: Path, in_copy: Callable[[str, bytes], Path], data: st.DataObject, file_name: str
) -> None:
    config = json.loads((good_folder / file_name).read_text())
    keys = data.draw(st.lists(st.sampled_from([*config, *OTHER_KEYS]), min_size=1, max_size=3))
    for key in keys:
        config[key] = data.draw(json_values)
    use(in_copy(file_name, json.dumps(config).encode()))


@fuzzing
@given(changes=patches, where=positions, truncate=st.booleans())
def test_damaged_json(
    good_folder: Path,
    in_copy: Callable[[str, bytes], Path],
    changes: list[tuple[float, int, int]],
    where: float,
    truncate: bool,
) -> None:
    content = (good_folder / "config.json").read_bytes()
    damaged = content[: int(where * len(content))] if truncate else damage(content, changes, len(content))
    use(in_copy("config.json", damaged))


def test_values_that_overflow_when_decoded(tmp_path: Path) -> None:
    """Scales of infinity and NaN decode to such values; nothing is raised."""
    config = {**TINY_CONFIGS["llama"], "num_hidden_layers": 1}
    quantized = gguf.GGMLQuantizationType.Q4_1
    path = write_gguf(tmp_path / "model.gguf", config, random_tensors(config), quantized=quantized)
    content = bytearray(path.read_bytes())
    info = read_gguf(path).tensors["token_embd.weight"]
    content[info.offset : info.offset + info.num_bytes] = b"\xff" * info.num_bytes
    path.write_bytes(content)
    assert np.isnan(dequantize(open_model(path).tensor("model.embed_tokens.weight"))).all()
