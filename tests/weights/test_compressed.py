"""GPTQ, AWQ and compressed-tensors: the very weights that were packed, and typed errors for the rest."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pelton.core.errors import ModelFileError, UnsupportedModelError
from pelton.weights.dequantize import dequantize
from pelton.weights.model_files import open_model
from tests.weights.make_compressed import LAYOUTS, Tensors, write_compressed, write_tensors

MATRIX = "model.layers.1.mlp.down_proj.weight"
MODULE = MATRIX.removesuffix(".weight")


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_are_those_that_were_packed(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    _, meant = write_compressed(tmp_path, layout)
    files = open_model(tmp_path)
    assert files.spec.quantization is not None
    assert ("fp8" if layout.method == "fp8" else f"int{layout.bits}") in files.spec.quantization
    assert set(files.tensor_names()) == set(meant)
    for tensor_name, expected in meant.items():
        tensor = files.tensor(tensor_name)
        assert (tensor.name, tensor.shape) == (tensor_name, expected.shape)
        assert tensor.format == (layout.expected_format if "_proj.weight" in tensor_name else "F32")
        np.testing.assert_array_equal(dequantize(tensor), expected, tensor_name)
    files.drop_pages()


def test_one_scale_for_a_whole_matrix(tmp_path: Path) -> None:
    layout = copy.deepcopy(LAYOUTS["w8a8"])
    layout.config["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    stored, _ = write_compressed(tmp_path, layout)
    for scale in (np.array([0x3C00], np.uint16), np.array(0x3C00, np.uint16)):
        stored[f"{MODULE}.weight_scale"] = scale  # 2 ** -7
        write_tensors(tmp_path / "model.safetensors", stored)
        expected = stored[f"{MODULE}.weight"].astype(np.float32) / 128
        np.testing.assert_array_equal(dequantize(open_model(tmp_path).tensor(MATRIX)), expected)


def _config_of(name: str, change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    config = copy.deepcopy(LAYOUTS[name].config)
    change(config)
    return config


def _weights_of(config: dict[str, Any]) -> dict[str, Any]:
    weights: dict[str, Any] = config["config_groups"]["group_0"]["weights"]
    return weights


UNSUPPORTED: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("gptq", lambda c: c.update(quant_method="gguf"), "method 'gguf'"),
    ("gptq", lambda c: c.update(bits=3), "3 bits; supported are 4"),
    ("gptq", lambda c: c.update(group_size=48), "groups of 48"),
    ("gptq", lambda c: c.update(checkpoint_format="marlin"), "'marlin'"),
    ("gptq", lambda c: c.update(dynamic={"-:x": {}}), "dynamic"),
    ("gptq", lambda c: c.update(group_size=64), "96 inputs"),
    ("awq", lambda c: c.update(version="gemv"), "'gemv'"),
    ("awq", lambda c: c.update(bits=8), "8 bits"),
    ("w8a8", lambda c: c.update(format="float-quantized"), "'float-quantized' of type 'int'"),
    ("fp8", lambda c: c.update(weight_block_size=[64, 64]), r"\[64, 64\]; supported is \[128, 128\]"),
    ("fp8", lambda c: c.update(activation_scheme="static"), "activation_scheme"),
    ("fp8 channel", lambda c: _weights_of(c).update(strategy="token"), "float8 with scales by 'token'"),
    ("fp8 channel", lambda c: _weights_of(c).update(strategy="block"), "blocks of None"),
    ("w8a8", lambda c: c.update(config_groups={}), "0 config_groups"),
    ("w8a8", lambda c: c.update(sparsity_config={"format": "sparse-24"}), "sparsity_config"),
    ("w8a8", lambda c: c["config_groups"]["group_0"].update(weights=None), "without quantized weights"),
    ("w8a8", lambda c: c["config_groups"]["group_0"].update(targets=["Embedding"]), "Embedding"),
    ("w8a8", lambda c: _weights_of(c).update(type="float"), "'float'"),
    ("w8a8", lambda c: _weights_of(c).update(symmetric=False), "asymmetric"),
    ("w8a8", lambda c: _weights_of(c).update(strategy="block"), "'block'"),
    ("w4a16", lambda c: _weights_of(c).update(actorder="group"), "activation order"),
    ("w4a16", lambda c: _weights_of(c).update(num_bits=2), "2 bits"),
]


@pytest.mark.parametrize(
    ("name", "change", "problem"), UNSUPPORTED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_is_not_implemented_is_refused(
    tmp_path: Path, name: str, change: Callable[[dict[str, Any]], Any], problem: str
) -> None:
    write_compressed(tmp_path, LAYOUTS[name])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": _config_of(name, change)}))
    with pytest.raises(UnsupportedModelError, match=problem):
        open_model(tmp_path).tensor(MATRIX)


def _reversed_groups(stored: Tensors) -> None:
    stored[f"{MODULE}.g_idx"] = stored[f"{MODULE}.g_idx"][::-1].copy()


BROKEN: list[tuple[str, Callable[[Tensors], Any], type[Exception], str]] = [
    ("gptq", _reversed_groups, UnsupportedModelError, "ordered by activation"),
    ("gptq", lambda s: s.pop(f"{MODULE}.scales"), ModelFileError, "scales is missing"),
    ("gptq", lambda s: s.update({f"{MODULE}.qweight": np.zeros((3, 3), np.int32)}), ModelFileError, r"I32 \[3, 3\]"),
    ("gptq", lambda s: s.update({f"{MODULE}.qzeros": np.zeros((3, 8), np.float32)}), ModelFileError, "F32"),
    ("gptq", lambda s: s.update({f"{MODULE}.scales": np.zeros((3, 64), np.int32)}), ModelFileError, "asks for floats"),
    ("awq", lambda s: s.update({f"{MODULE}.scales": np.zeros((1, 64), np.float16)}), ModelFileError, r"\[1, 64\]"),
    (
        "awq",
        lambda s: s.update({MATRIX: np.zeros((64, 96), np.float32)}),
        ModelFileError,
        "both as it is and compressed",
    ),
    ("w8a8", lambda s: s.pop(f"{MODULE}.weight"), ModelFileError, "weight is missing"),
    ("w8a8", lambda s: s.update({MATRIX: np.zeros((64, 95), np.int8)}), ModelFileError, r"\[64, 95\]"),
    ("w8a8", lambda s: s.update({f"{MODULE}.weight_scale": np.zeros(3, np.float32)}), ModelFileError, r"F32 \[3\]"),
    (
        "w8a8",
        lambda s: s.update({f"{MODULE}.weight_zero_point": np.ones((64, 1), np.int8)}),
        UnsupportedModelError,
        "zero points",
    ),
    (
        "w8a8",
        lambda s: s.update({f"{MODULE}.input_scale": np.ones(1, np.float32)}),
        UnsupportedModelError,
        "input_scale",
    ),
    (
        "w4a16",
        lambda s: s.update({f"{MODULE}.weight_packed": np.zeros((64, 24), np.int32)}),
        ModelFileError,
        "weight_packed",
    ),
    ("fp8", lambda s: s.pop(f"{MODULE}.weight_scale_inv"), ModelFileError, "weight_scale_inv is missing"),
    ("fp8", lambda s: s.update({f"{MODULE}.weight_scale_inv": np.zeros(3, np.float32)}), ModelFileError, r"F32 \[3\]"),
    ("fp8", lambda s: s.update({MATRIX: np.zeros((64, 64), np.uint8)}), ModelFileError, r"F8_E4M3 \[64, 64\]"),
    ("w4a16, zeros", lambda s: s.pop(f"{MODULE}.weight_zero_point"), ModelFileError, "weight_zero_point is missing"),
]


@pytest.mark.parametrize(
    ("name", "change", "error", "problem"), BROKEN, ids=lambda value: value if isinstance(value, str) else ""
)
def test_parts_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, change: Callable[[Tensors], Any], error: type[Exception], problem: str
) -> None:
    stored, _ = write_compressed(tmp_path, LAYOUTS[name])
    change(stored)
    write_tensors(tmp_path / "model.safetensors", stored)
    with pytest.raises(error, match=problem):
        _ = open_model(tmp_path).tensor(MATRIX).data


def test_embeddings_in_integers_are_refused(tmp_path: Path) -> None:
    """Their rows are looked up in the file's own bytes."""
    name = "model.embed_tokens.weight"
    stored, meant = write_compressed(tmp_path, LAYOUTS["w8a8"])
    stored[name] = np.zeros(meant[name].shape, np.int8)
    write_tensors(tmp_path / "model.safetensors", stored)
    with pytest.raises(UnsupportedModelError, match="stored as I8"):
        open_model(tmp_path).tensor(name)
