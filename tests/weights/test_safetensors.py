"""The safetensors container: agreement with the reference writer, and typed errors for the rest."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from pelton.core.errors import ModelFileError, UnsupportedModelError
from pelton.weights.safetensors import SafetensorsFile, open_safetensors_folder


def container(header: Any, data: bytes = b"", header_bytes: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if header_bytes is None else header_bytes) + encoded + data


def entry(begin: int, end: int, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_reads_what_the_reference_writer_wrote(tmp_path: Path) -> None:
    tensors = {
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.arange(3, dtype=np.float16),
        "counts": np.arange(4, dtype=np.int64),
    }
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert set(file.tensors) == set(tensors)
    matrix = file.tensor("matrix")
    assert (matrix.name, matrix.shape, matrix.format) == ("matrix", (2, 3), "F32")
    np.testing.assert_array_equal(matrix.data.view(np.float32).reshape(2, 3), tensors["matrix"])
    np.testing.assert_array_equal(file.tensor("half").data.view(np.float16), tensors["half"])
    assert not matrix.data.flags.writeable
    with pytest.raises(UnsupportedModelError, match="'counts' is stored as I64; supported are F32, F16, BF16"):
        file.tensor("counts")


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "seven bytes": (bytes(7), "truncated"),
    "huge header": (container({}, header_bytes=2**63), "claims a header"),
    "header longer than file": (container({}, header_bytes=3), "claims a header"),
    "header not JSON": (container(b"{"), "not valid JSON"),
    "header not UTF-8": (container(b'{"\xff": 1}'), "UTF-8"),
    "header a list": (container([]), "an object is expected"),
    "header nested deeply": (container(b"[" * 200_000), "nested too deeply"),
    "number of a million digits": (container(b'{"a": ' + b"9" * 1_000_000 + b"}"), "not valid JSON"),
    "name twice": (container(b'{"a": 1, "a": 2}'), "twice"),
    "entry a number": (container({"a": 1}), "is not an object"),
    "entry empty": (container({"a": {}}), "unknown dtype None"),
    "unknown dtype": (container({"a": entry(0, 4, "F31")}, bytes(4)), "unknown dtype 'F31'"),
    "dtype a list": (container({"a": entry(0, 4, ["F32"])}, bytes(4)), "unknown dtype"),
    "shape negative": (container({"a": entry(0, 4, shape=[-1])}, bytes(4)), "no valid shape"),
    "shape of booleans": (container({"a": entry(0, 4, shape=[True])}, bytes(4)), "no valid shape"),
    "shape of floats": (container({"a": entry(0, 4, shape=[1.0])}, bytes(4)), "no valid shape"),
    "shape text": (container({"a": entry(0, 4, shape="1")}, bytes(4)), "no valid shape"),
    "shape too long": (container({"a": entry(0, 4, shape=[1] * 9)}, bytes(4)), "no valid shape"),
    "shape overflows": (container({"a": entry(0, 4, shape=[2**40, 2**40])}, bytes(4)), "spans 4 bytes"),
    "shape against offsets": (container({"a": entry(0, 8, shape=[1])}, bytes(8)), "spans 8 bytes"),
    "offsets reversed": (container({"a": entry(4, 0, shape=[1])}, bytes(4)), "no valid data_offsets"),
    "offsets missing": (container({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "no valid data_offsets"),
    "past the end": (container({"a": entry(0, 8)}, bytes(4)), "truncated"),
    "overlap": (container({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "overlap"),
    "gap": (container({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "leave 4 bytes unused"),
    "data after the last": (container({"a": entry(0, 4)}, bytes(8)), "unknown data at its end"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_a_typed_error(tmp_path: Path, name: str) -> None:
    content, problem = BAD_FILES[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError, match=problem) as caught:
            SafetensorsFile(path)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 1000
        assert tracemalloc.get_traced_memory()[1] < 16 * len(content) + 1_000_000
    finally:
        tracemalloc.stop()


def test_truncation_anywhere_is_a_typed_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": np.ones(5, np.float32), "b": np.ones((2, 2), np.float16)}, path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ModelFileError):
            SafetensorsFile(path)


def write_shards(folder: Path, weight_map: Any) -> None:
    safetensors.numpy.save_file({"a": np.ones(2, np.float32)}, folder / "one.safetensors")
    safetensors.numpy.save_file({"b": np.zeros(3, np.float32)}, folder / "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_joined(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    placed = open_safetensors_folder(tmp_path)
    assert placed["a"].tensor("a").data.view(np.float32).tolist() == [1, 1]
    assert placed["b"].tensor("b").data.view(np.float32).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("weight_map", "problem"),
    [
        ({}, "weight_map is missing or empty"),
        (["one.safetensors"], "weight_map is missing or empty"),
        ({"a": "three.safetensors"}, "shard 'three.safetensors' is missing"),
        ({"b": "one.safetensors"}, "'b' is not in 'one.safetensors'"),
        ({"a": 7}, "plain name"),
        ({"a": "../one.safetensors"}, "plain name"),
        ({"a": "/etc/one.safetensors"}, "plain name"),
        ({"a": "sub/one.safetensors"}, "plain name"),
        ({"a": "C:\\one.safetensors"}, "plain name"),
        ({"a": "nul\0.safetensors"}, "plain name"),
        ({"a": "one.bin"}, "plain name"),
    ],
)
def test_bad_index_is_a_typed_error(tmp_path: Path, weight_map: Any, problem: str) -> None:
    write_shards(tmp_path, weight_map)
    with pytest.raises(ModelFileError, match=problem):
        open_safetensors_folder(tmp_path)


def test_folder_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"neither model\.safetensors nor"):
        open_safetensors_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelFileError, match="only pickled weights"):
        open_safetensors_folder(tmp_path)
