"""The GGUF container: what a good file says, and that no bad one gets further than a typed error."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from pelton.core.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from pelton.weights.gguf.reader import read_gguf
from tests.weights.make_models import array, key, raw_gguf, tensor_info, text

U8, U32, F32_VALUE, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
HUGE = 2**63


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return path


def test_reads_what_the_reference_writer_wrote(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a.uint8", 255)
    writer.add_int8("a.int8", -128)
    writer.add_uint16("a.uint16", 65535)
    writer.add_int16("a.int16", -32768)
    writer.add_uint32("a.uint32", 2**32 - 1)
    writer.add_int32("a.int32", -(2**31))
    writer.add_uint64("a.uint64", 2**64 - 1)
    writer.add_int64("a.int64", -(2**63))
    writer.add_float32("a.float32", 0.5)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "Grüße 🌍")
    writer.add_array("a.strings", ["", "x", "日本"])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.bools", [True, False])
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    packed = np.arange(2 * 68, dtype=np.uint8).reshape(2, 68)
    writer.add_tensor("matrix", matrix)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = read_gguf(path)
    assert dict(file.metadata) == {
        "general.architecture": "llama",
        "a.uint8": 255,
        "a.int8": -128,
        "a.uint16": 65535,
        "a.int16": -32768,
        "a.uint32": 2**32 - 1,
        "a.int32": -(2**31),
        "a.uint64": 2**64 - 1,
        "a.int64": -(2**63),
        "a.float32": 0.5,
        "a.float64": 0.1,
        "a.bool": True,
        "a.string": "Grüße 🌍",
        "a.strings": ["", "x", "日本"],
        "a.ints": [1, -2, 3],
        "a.bools": [True, False],
    }
    assert file.metadata["a.bool"] is True
    assert file.metadata.get("absent") is None
    assert (file.tensors["matrix"].shape, file.tensors["matrix"].format) == ((2, 3), "F32")
    assert (file.tensors["packed"].shape, file.tensors["packed"].format) == ((2, 64), "Q8_0")
    np.testing.assert_array_equal(file.tensor_data("matrix").view(np.float32), matrix.ravel())
    np.testing.assert_array_equal(file.tensor_data("packed"), packed.ravel())
    assert not file.tensor_data("packed").flags.writeable


def test_custom_alignment_moves_the_data(tmp_path: Path) -> None:
    keys = [key("general.alignment", U32, struct.pack("<I", 256))]
    content = raw_gguf(keys, [tensor_info("t", (2,))])
    content = content.ljust(256, b"\0") + np.array([1.5, -2.0], dtype="<f4").tobytes()
    file = read_gguf(write(tmp_path, content))
    assert file.tensor_data("t").view(np.float32).tolist() == [1.5, -2.0]


def test_version_2_is_read(tmp_path: Path) -> None:
    file = read_gguf(write(tmp_path, raw_gguf([key("k", U8, b"\7")], version=2)))
    assert dict(file.metadata) == {"k": 7}


def alignment(value: bytes, kind: int = U32) -> list[bytes]:
    return [key("general.alignment", kind, value)]


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "magic only": (b"GGUF", "truncated"),
    "other magic": (raw_gguf(magic=b"ggml"), "not a GGUF file"),
    "version 1": (raw_gguf(version=1), "version 1 is not supported"),
    "version 4": (raw_gguf(version=4), "version 4 is not supported"),
    "version 0": (raw_gguf(version=0), "version 0 is not supported"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "huge tensor count": (raw_gguf(num_tensors=HUGE), "tensors"),
    "huge key count": (raw_gguf(num_keys=HUGE), "metadata keys"),
    "more keys than bytes": (raw_gguf([key("k", U8, b"\7")], num_keys=9), "metadata keys"),
    "long key": (raw_gguf([struct.pack("<Q", HUGE) + b"k" * 64]), "metadata key"),
    "key not text": (raw_gguf([key(b"\xff\xfe", U8, b"\7")]), "UTF-8"),
    "key twice": (raw_gguf([key("k", U8, b"\7")] * 2), "occurs twice"),
    "unknown value type": (raw_gguf([key("k", 13, bytes(8))]), "unknown value type 13"),
    "long string": (raw_gguf([key("k", STRING, struct.pack("<Q", HUGE))]), "bytes in"),
    "huge array": (raw_gguf([key("k", ARRAY, array(U8, HUGE, b""))]), "elements in"),
    "array times size overflows": (raw_gguf([key("k", ARRAY, array(U64, 2**61, b""))]), "elements in"),
    "huge string array": (raw_gguf([key("k", ARRAY, array(STRING, HUGE, b""))]), "strings in"),
    "string array runs out": (
        raw_gguf([key("k", ARRAY, array(STRING, 2, text("a") + text("b" * 99)[:20]))]),
        "past the end",
    ),
    "string in array of huge length": (
        raw_gguf([key("k", ARRAY, array(STRING, 2, struct.pack("<QQ", HUGE, HUGE)))]),
        "past the end",
    ),
    "array of arrays": (raw_gguf([key("k", ARRAY, array(ARRAY, 1, array(U8, 1, b"\1")))]), "array of arrays"),
    "unknown element type": (raw_gguf([key("k", ARRAY, array(99, 1, bytes(8)))]), "unknown element type 99"),
    "alignment 0": (raw_gguf(alignment(struct.pack("<I", 0))), "power of two"),
    "alignment 24": (raw_gguf(alignment(struct.pack("<I", 24))), "power of two"),
    "alignment text": (raw_gguf(alignment(text("32"), STRING)), "power of two"),
    "no dimensions": (raw_gguf(tensors=[tensor_info("t", ())], data=bytes(64)), "dimensions"),
    "five dimensions": (raw_gguf(tensors=[tensor_info("t", (1,) * 5)], data=bytes(64)), "dimensions"),
    "empty tensor": (raw_gguf(tensors=[tensor_info("t", (4, 0))], data=bytes(64)), "is empty"),
    "size product overflows": (
        raw_gguf(tensors=[tensor_info("t", (2**32, 2**32))], data=bytes(64)),
        "truncated or corrupt: tensor",
    ),
    "unknown tensor type": (
        raw_gguf(tensors=[tensor_info("t", (4,), kind=77)], data=bytes(64)),
        "unknown type number 77",
    ),
    "removed tensor type": (
        raw_gguf(tensors=[tensor_info("t", (4,), kind=4)], data=bytes(64)),
        "unknown type number 4",
    ),
    "row not whole blocks": (
        raw_gguf(tensors=[tensor_info("t", (33, 32), kind=8)], data=bytes(2048)),
        "multiple of 32",
    ),
    "unaligned tensor": (raw_gguf(tensors=[tensor_info("t", (4,), offset=8)], data=bytes(64)), "alignment 32"),
    "tensor past the end": (
        raw_gguf(tensors=[tensor_info("t", (4,), offset=64)], data=bytes(64)),
        "truncated or corrupt",
    ),
    "offset overflows": (raw_gguf(tensors=[tensor_info("t", (4,), offset=2**64 - 32)], data=bytes(64)), "truncated"),
    "tensor twice": (
        raw_gguf(tensors=[tensor_info("t", (4,)), tensor_info("t", (4,), offset=32)], data=bytes(64)),
        "occurs twice",
    ),
    "tensors overlap": (
        raw_gguf(tensors=[tensor_info("a", (16,)), tensor_info("b", (4,), offset=32)], data=bytes(64)),
        "overlap",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_a_typed_error(tmp_path: Path, name: str) -> None:
    content, problem = BAD_FILES[name]
    path = write(tmp_path, content)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError, match=problem) as caught:
            read_gguf(path)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 1000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("kind", "value", "problem"),
    [
        (BOOL, b"\2", "neither 0 nor 1"),
        (ARRAY, array(BOOL, 2, b"\1\7"), "neither 0 nor 1"),
        (STRING, text(b"\xc3"), "not valid UTF-8"),
        (ARRAY, array(STRING, 2, text("fine") + text(b"\xc3")), "string 1 of 'k' is not valid UTF-8"),
    ],
)
def test_bad_value_is_a_typed_error_when_asked_for(tmp_path: Path, kind: int, value: bytes, problem: str) -> None:
    file = read_gguf(write(tmp_path, raw_gguf([key("k", kind, value), key("other", U8, b"\7")])))
    assert file.metadata["other"] == 7
    with pytest.raises(ModelFileError, match=problem):
        file.metadata["k"]


def test_block_format_that_is_not_implemented_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, raw_gguf(tensors=[tensor_info("t", (256,), kind=16)], data=bytes(66)))
    with pytest.raises(UnsupportedModelError, match="IQ2_XXS"):
        read_gguf(path)


def test_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, raw_gguf([key("split.count", 2, struct.pack("<H", 3))]))
    with pytest.raises(UnsupportedModelError, match="split"):
        read_gguf(path)


def test_truncation_anywhere_is_a_typed_error(tmp_path: Path) -> None:
    keys = [
        key("general.architecture", STRING, text("llama")),
        key("tokens", ARRAY, array(STRING, 3, text("a") + text("bc") + text(""))),
        key("scores", ARRAY, array(F32_VALUE, 3, bytes(12))),
    ]
    content = raw_gguf(keys, [tensor_info("t", (4, 8)), tensor_info("u", (8,), offset=128)], bytes(160))
    read_gguf(write(tmp_path, content))
    for length in range(len(content)):
        with pytest.raises(ModelFileError):
            read_gguf(write(tmp_path, content[:length]))


def test_what_is_not_a_regular_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such file"):
        read_gguf(tmp_path / "absent.gguf")
    with pytest.raises(ModelFileError, match="not a regular file"):
        read_gguf(Path("/dev/zero"))
    with pytest.raises(ModelNotFoundError, match="no such file"):
        read_gguf(Path("nul\0byte"))
