"""The default model's real file, against the `gguf` package's own reading."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from pelton.weights.architectures import expected_tensors
from pelton.weights.dequantize import dequantize, dequantize_rows
from pelton.weights.gguf.names import hf_name
from pelton.weights.gguf.reader import read_gguf
from pelton.weights.model_files import open_model

pytestmark = pytest.mark.model


def test_spec_defaults_and_template(default_model_path: Path) -> None:
    files = open_model(default_model_path)
    spec = files.spec
    assert (spec.architecture, spec.num_layers, spec.hidden_size, spec.intermediate_size) == ("qwen2", 24, 896, 4864)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (14, 2, 64, 151936)
    assert (spec.max_model_len, spec.rope.theta, spec.attention_bias) == (32768, 1e6, True)
    assert (spec.tie_word_embeddings, spec.quantization) == (False, "Q4_K_M")
    assert files.generation_defaults.eos_token_ids == (151645,)
    assert files.chat_template is not None
    assert "<|im_start|>" in files.chat_template


def test_every_tensor_is_there_in_its_packed_form(default_model_path: Path) -> None:
    files = open_model(default_model_path)
    shapes = expected_tensors(files.spec)
    assert set(files.tensor_names()) == set(shapes)
    formats = set()
    for name, shape in shapes.items():
        tensor = files.tensor(name)
        assert tensor.shape == shape
        formats.add(tensor.format)
    assert formats == {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}


def test_tensors_decode_as_the_gguf_package_decodes_them(default_model_path: Path) -> None:
    files = open_model(default_model_path)
    packed = read_gguf(default_model_path)
    picked: dict[str, str] = {}
    for info in packed.tensors.values():
        # One matrix of each format of a layer, the vectors of one layer; a whole vocabulary takes too long here.
        if info.name.startswith("blk.") and (len(info.shape) == 2 or info.name.startswith("blk.5.")):
            picked.setdefault(info.format if len(info.shape) == 2 else info.name, info.name)
    assert len(picked) > 8
    for gguf_name in picked.values():
        info = packed.tensors[gguf_name]
        rows = packed.tensor_data(gguf_name).reshape(info.shape[0] if len(info.shape) == 2 else 1, -1)
        expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[info.format]).reshape(info.shape)
        name = hf_name(gguf_name, "qwen2")
        assert name is not None
        np.testing.assert_array_equal(dequantize(files.tensor(name)), expected, err_msg=gguf_name)


def test_rows_of_the_embedding(default_model_path: Path) -> None:
    embedding = open_model(default_model_path).tensor("model.embed_tokens.weight")
    token_ids = np.array([0, 151645, 1234, 151935])
    rows = dequantize_rows(embedding, token_ids)
    for row, token_id in zip(rows, token_ids, strict=True):
        np.testing.assert_array_equal(row, dequantize(embedding, rows=slice(token_id, token_id + 1))[0])
    assert 0.001 < np.abs(rows).mean() < 0.1
