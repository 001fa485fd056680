"""Files of LoRA adapters: what is read, what is refused and why; nothing here imports torch or peft."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy

from pelton.core.errors import ConfigError, ModelFileError, ModelNotFoundError, PeltonError, UnsupportedModelError
from pelton.core.lora import NamedLora
from pelton.core.model_spec import ModelSpec
from pelton.weights.config import ModelConfig, parse_lora_modules
from pelton.weights.dequantize import dequantize
from pelton.weights.lora import open_adapter
from pelton.weights.specs import spec_from_config
from tests.weights.make_models import TINY_CONFIGS

Q0, UP1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "peft_version": "0.21.2",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "up_proj"],
    "bias": "none",
    "lora_dropout": 0.1,
    "init_lora_weights": True,
    "base_model_name_or_path": "somebody/model",
    "modules_to_save": None,
    "use_dora": False,
}


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return spec_from_config(Path("config.json"), TINY_CONFIGS["llama"])


def matrices(spec: ModelSpec, rank: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {Q0: (spec.num_heads * spec.head_dim, spec.hidden_size), UP1: (spec.intermediate_size, spec.hidden_size)}
    found = {}
    for name, (num_outputs, num_inputs) in shapes.items():
        prefix = f"base_model.model.{name}"
        found[f"{prefix}.lora_A.weight"] = rng.standard_normal((rank, num_inputs), dtype=np.float32)
        found[f"{prefix}.lora_B.weight"] = rng.standard_normal((num_outputs, rank), dtype=np.float32)
    return found


def save(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def test_matrices_and_scales(tmp_path: Path, spec: ModelSpec) -> None:
    tensors = matrices(spec)
    adapter = open_adapter(save(tmp_path, tensors), spec, 8)
    assert (adapter.rank, adapter.base_model, set(adapter.modules)) == (4, "somebody/model", {Q0, UP1})
    module = adapter.modules[UP1]
    assert module.scale == 2.0
    np.testing.assert_array_equal(dequantize(module.a), tensors[f"base_model.model.{UP1}.lora_A.weight"])
    np.testing.assert_array_equal(dequantize(module.b), tensors[f"base_model.model.{UP1}.lora_B.weight"])


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, (2.0, 2.0)),
        ({"use_rslora": True}, (4.0, 4.0)),
        ({"lora_alpha": 0.5}, (0.125, 0.125)),
        ({"alpha_pattern": {"q_proj": 2}}, (0.5, 2.0)),
        ({"alpha_pattern": {"model.layers.1.mlp.up_proj": 1, "up_proj": 3}}, (2.0, 0.25)),
        ({"alpha_pattern": {r"^model\.layers\.[0-9]\.mlp\.up_proj": 3}}, (2.0, 0.75)),
        ({"alpha_pattern": {"layers.*proj": 6}}, (1.5, 1.5)),
        ({"alpha_pattern": {"proj": 6, "q": 5}}, (2.0, 2.0)),  # whole names, as peft has it
        ({"r": 64, "rank_pattern": {"q_proj": 4, "up_proj": 4}}, (2.0, 2.0)),
        ({"some_new_switch": False, "some_new_table": {}}, (2.0, 2.0)),
    ],
)
def test_scale_of_a_module(
    tmp_path: Path, spec: ModelSpec, config: dict[str, Any], scales: tuple[float, float]
) -> None:
    modules = open_adapter(save(tmp_path, matrices(spec), **config), spec, 8).modules
    assert (modules[Q0].scale, modules[UP1].scale) == scales


def test_an_id_is_of_the_content_alone(tmp_path: Path, spec: ModelSpec) -> None:
    def lora_id(name: str, tensors: dict[str, np.ndarray], **config: Any) -> str:
        return open_adapter(save(tmp_path / name, tensors, **config), spec, 8).lora_id

    first = lora_id("a", matrices(spec))
    assert lora_id("b", matrices(spec), lora_dropout=0.5, base_model_name_or_path="another") == first
    changed = matrices(spec)
    changed[f"base_model.model.{UP1}.lora_B.weight"][3, 2] += 1e-6
    others = [
        lora_id("c", changed),
        lora_id("d", matrices(spec), lora_alpha=9),
        lora_id("e", matrices(spec, seed=1)),
        lora_id("f", {name: tensor for name, tensor in matrices(spec).items() if Q0 in name}),
    ]
    assert len({first, *others}) == 5


def test_memory_is_its_own(tmp_path: Path, spec: ModelSpec) -> None:
    """Files may be overwritten in place while the adapter is served."""
    adapter = open_adapter(save(tmp_path, matrices(spec)), spec, 8)
    before = dequantize(adapter.modules[Q0].a)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4096] + bytes(4096))
    np.testing.assert_array_equal(dequantize(adapter.modules[Q0].a), before)


REFUSED_CONFIGS: list[tuple[dict[str, Any], type[PeltonError], str]] = [
    ({"peft_type": "IA3"}, UnsupportedModelError, "IA3"),
    ({"peft_type": 3}, ModelFileError, "peft_type"),
    ({"use_dora": True}, UnsupportedModelError, "DoRA"),
    ({"bias": "all"}, UnsupportedModelError, "bias"),
    ({"modules_to_save": ["lm_head"]}, UnsupportedModelError, "modules_to_save"),
    ({"fan_in_fan_out": True}, UnsupportedModelError, "fan_in_fan_out"),
    ({"layer_replication": [[0, 1]]}, UnsupportedModelError, "repeats layers"),
    ({"init_lora_weights": "pissa_niter_4"}, UnsupportedModelError, "pissa"),
    ({"init_lora_weights": ["pissa"]}, UnsupportedModelError, "pissa"),
    ({"trainable_token_indices": [1]}, UnsupportedModelError, "trainable_token_indices"),
    ({"a_new_kind_of_thing": {"a": 1}}, UnsupportedModelError, "a_new_kind_of_thing"),
    ({"r": 0}, ModelFileError, "r is 0"),
    ({"r": "4"}, ModelFileError, "an integer"),
    ({"r": 8}, ModelFileError, "rank 4; the config says 8"),
    ({"rank_pattern": {"q_proj": 5}}, ModelFileError, "rank 4; the config says 5"),
    ({"lora_alpha": -1}, ModelFileError, "lora_alpha"),
    ({"lora_alpha": 1e300}, ModelFileError, "at most"),
    ({"lora_alpha": None}, ModelFileError, "lora_alpha"),
    ({"use_rslora": "yes"}, ModelFileError, "use_rslora"),
    ({"alpha_pattern": ["q_proj"]}, ModelFileError, "alpha_pattern"),
    ({"alpha_pattern": {"q_proj": "x"}}, ModelFileError, "a number"),
    ({"alpha_pattern": {"(a+)+b": 1}}, UnsupportedModelError, "too intricate"),
    ({"alpha_pattern": {"a*a*a*a*b": 1}}, UnsupportedModelError, "too intricate"),
    ({"alpha_pattern": {"(": 1}}, ModelFileError, "alpha_pattern"),
    ({"alpha_pattern": {"q" * 300: 1}}, UnsupportedModelError, "too intricate"),
]


@pytest.mark.parametrize(("config", "kind", "words"), REFUSED_CONFIGS, ids=lambda value: str(value)[:40])
def test_configs_that_are_refused(
    tmp_path: Path, spec: ModelSpec, config: dict[str, Any], kind: type[PeltonError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        open_adapter(save(tmp_path, matrices(spec), **config), spec, 8)


def _rename(part: str, other: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda tensors: {name.replace(part, other): tensor for name, tensor in tensors.items()}


def _set(name: str, tensor: np.ndarray) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda tensors: tensors | {name: tensor}


QA = f"base_model.model.{Q0}.lora_A.weight"
REFUSED_TENSORS: dict[str, tuple[Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], type[PeltonError], str]] = {
    "none": (lambda _: {}, ModelFileError, "no LoRA"),
    "one of two": (lambda t: {QA: t[QA]}, ModelFileError, "one of its two"),
    "unknown layer": (_rename("layers.0", "layers.7"), ModelFileError, "layers.7"),
    "unknown module": (_rename("q_proj", "w_proj"), ModelFileError, "w_proj"),
    "norm": (_rename("self_attn.q_proj", "input_layernorm"), ModelFileError, "input_layernorm"),
    "too wide": (_set(QA, np.zeros((4, 65), np.float32)), ModelFileError, "the model wants"),
    "other rank": (_set(QA, np.zeros((3, 64), np.float32)), ModelFileError, "the model wants"),
    "no rank": (_set(QA, np.zeros((0, 64), np.float32)), ModelFileError, "the model wants"),
    "vector": (_set(QA, np.zeros(64, np.float32)), ModelFileError, "the model wants"),
    "NaN": (_set(QA, np.full((4, 64), math.nan, np.float32)), ModelFileError, "not finite"),
    "infinity": (_set(QA, np.full((4, 64), math.inf, np.float16)), ModelFileError, "not finite"),
    "integers": (_set(QA, np.zeros((4, 64), np.int32)), UnsupportedModelError, "I32"),
    "twice": (_set(QA.replace("lora_A", "lora_A.default"), np.zeros((4, 64), np.float32)), ModelFileError, "two"),
    "magnitudes": (
        _set(QA.replace("lora_A", "lora_magnitude_vector"), np.zeros(64, np.float32)),
        UnsupportedModelError,
        "plain LoRA",
    ),
    "embedding": (
        _set("base_model.model.model.embed_tokens.lora_embedding_A", np.zeros((4, 96), np.float32)),
        UnsupportedModelError,
        "plain LoRA",
    ),
    "a weight of the model": (
        _set("base_model.model.model.norm.weight", np.zeros(64, np.float32)),
        ModelFileError,
        "not a matrix of LoRA",
    ),
    "another head": (
        _set("base_model.model.lm_head.base_layer.weight", np.zeros((97, 64), np.float32)),
        ModelFileError,
        "not a matrix of LoRA",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED_TENSORS))
def test_tensors_that_are_refused(tmp_path: Path, spec: ModelSpec, name: str) -> None:
    change, kind, words = REFUSED_TENSORS[name]
    with pytest.raises(kind, match=words):
        open_adapter(save(tmp_path, change(matrices(spec))), spec, 8)


def test_a_rank_above_the_limit_is_refused(tmp_path: Path, spec: ModelSpec) -> None:
    with pytest.raises(ModelFileError, match=r"rank 9, more than max_lora_rank allows \(8\)"):
        open_adapter(save(tmp_path, matrices(spec, 9), r=9), spec, 8)


def test_files_that_are_missing_or_of_another_kind(tmp_path: Path, spec: ModelSpec) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        open_adapter(tmp_path / "nowhere", spec, 8)
    with pytest.raises(ModelNotFoundError):
        open_adapter(tmp_path / "nowhere.gguf", spec, 8)
    with pytest.raises(ModelNotFoundError, match="adapter_config"):
        open_adapter(tmp_path, spec, 8)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelFileError, match="pickled"):
        open_adapter(tmp_path, spec, 8)
    folder = save(tmp_path / "whole", matrices(spec))
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFileError):
            open_adapter(folder, spec, 8)
    path.write_bytes(whole)
    for text in ("", "[]", "{", "[" * 100_000, '{"peft_type": "LORA"}', "\xff"):
        (folder / "adapter_config.json").write_text(text, encoding="latin-1")
        with pytest.raises(ModelFileError):
            open_adapter(folder, spec, 8)


def write_gguf(path: Path, spec: ModelSpec, *, alpha: float = 8.0, kind: str = "adapter") -> dict[str, np.ndarray]:
    """As llama.cpp's converter: rows of q in its own order for Llama."""
    tensors = matrices(spec)
    writer = gguf.GGUFWriter(path, spec.architecture)
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for base, name in ((Q0, "blk.0.attn_q"), (UP1, "blk.1.ffn_up")):
        a, b = (tensors[f"base_model.model.{base}.lora_{side}.weight"] for side in "AB")
        if base == Q0:
            b = b.reshape(spec.num_heads, 2, spec.head_dim // 2, -1).swapaxes(1, 2).reshape(b.shape)
        writer.add_tensor(f"{name}.weight.lora_a", np.ascontiguousarray(a))
        writer.add_tensor(f"{name}.weight.lora_b", np.ascontiguousarray(b).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_gguf(tmp_path: Path, spec: ModelSpec) -> None:
    tensors = write_gguf(tmp_path / "a.gguf", spec)
    adapter = open_adapter(tmp_path / "a.gguf", spec, 8)
    assert set(adapter.modules) == {Q0, UP1}
    for name, module in adapter.modules.items():
        assert module.scale == 2.0
        np.testing.assert_array_equal(dequantize(module.a), tensors[f"base_model.model.{name}.lora_A.weight"])
        np.testing.assert_array_equal(dequantize(module.b), tensors[f"base_model.model.{name}.lora_B.weight"])
    write_gguf(tmp_path / "b.gguf", spec, alpha=0.0)
    assert open_adapter(tmp_path / "b.gguf", spec, 8).modules[Q0].scale == 1.0
    write_gguf(tmp_path / "c.gguf", spec, kind="model")
    with pytest.raises(UnsupportedModelError, match="not an adapter"):
        open_adapter(tmp_path / "c.gguf", spec, 8)
    other = spec_from_config(Path("config.json"), TINY_CONFIGS["qwen2"])
    with pytest.raises(ModelFileError, match="architecture"):
        open_adapter(tmp_path / "a.gguf", other, 8)


def test_settings() -> None:
    entries = ("a=/x/y=z", '{"name": "b", "path": "p", "base_model_name": "m"}')
    assert parse_lora_modules(entries) == (NamedLora("a", "/x/y=z"), NamedLora("b", "p"))
    for entry in ("a", "=p", "a=", "{", '{"name": "a"}', '{"name": 1, "path": "p"}', "[" * 9999):
        with pytest.raises(ConfigError, match="NAME=PATH"):
            ModelConfig(lora_modules=(entry,))
    with pytest.raises(ConfigError, match="max_loras"):
        ModelConfig(max_loras=0)
