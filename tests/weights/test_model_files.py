"""`open_model`: the same model read from a folder and from a GGUF file, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy

from pelton.core.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from pelton.weights.architectures import expected_tensors
from pelton.weights.dequantize import dequantize
from pelton.weights.model_files import open_model
from pelton.weights.tensors import ModelFiles
from tests.weights.make_models import TINY_CONFIGS, random_tensors, write_folder, write_gguf

Weights = dict[str, np.ndarray]


def read_all(files: ModelFiles) -> Weights:
    return {name: dequantize(files.tensor(name)) for name in files.tensor_names()}


def assert_close(actual: Weights, expected: Weights, tolerance: float = 0.0) -> None:
    assert set(actual) == set(expected)
    for name, weights in expected.items():
        np.testing.assert_allclose(actual[name], weights, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("architecture", TINY_CONFIGS)
def test_folder_and_gguf_give_the_same_model(tmp_path: Path, architecture: str) -> None:
    config = TINY_CONFIGS[architecture]
    tensors = random_tensors(config)
    folder = open_model(write_folder(tmp_path / "folder", config, tensors))
    packed = open_model(write_gguf(tmp_path / "model.gguf", config, tensors))

    assert folder.spec.architecture == architecture
    assert_close(read_all(folder), tensors)
    assert set(expected_tensors(folder.spec)) == set(tensors)
    # Norms of Gemma lose a bit when 1 is added in float32, everything else is exact.
    assert_close(read_all(packed), tensors, tolerance=1e-6 if architecture.startswith("gemma") else 0.0)
    # GGUF has no name of its own for Mistral, and holds the norm epsilon in float32.
    same = replace(packed.spec, architecture=architecture, rms_norm_eps=folder.spec.rms_norm_eps)
    assert same == folder.spec
    assert packed.spec.rms_norm_eps == pytest.approx(folder.spec.rms_norm_eps)


def test_packed_rows_of_llama_are_put_in_order_without_decoding(tmp_path: Path) -> None:
    config = TINY_CONFIGS["llama"]
    tensors = random_tensors(config)
    quantized = gguf.GGMLQuantizationType.Q8_0
    files = open_model(write_gguf(tmp_path / "model.gguf", config, tensors, quantized=quantized))
    for module in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.1.self_attn.{module}.weight"
        tensor = files.tensor(name)
        assert tensor.format == "Q8_0"
        expected = gguf.quants.quantize(tensors[name], quantized)
        np.testing.assert_array_equal(tensor.data, expected.reshape(-1))


def test_biases_of_llama_are_put_in_order(tmp_path: Path) -> None:
    config = {**TINY_CONFIGS["llama"], "attention_bias": True, "mlp_bias": True}
    tensors = random_tensors(config)
    assert "model.layers.0.self_attn.o_proj.bias" in tensors
    files = open_model(write_gguf(tmp_path / "model.gguf", config, tensors))
    assert (files.spec.attention_bias, files.spec.attention_output_bias, files.spec.mlp_bias) == (True, True, True)
    assert_close(read_all(files), tensors)


def test_rope_frequencies_of_gguf_go_into_the_spec(tmp_path: Path) -> None:
    config = TINY_CONFIGS["llama"]
    tensors = random_tensors(config)
    factors = np.linspace(1, 8, 8, dtype=np.float32)

    def open_with(values: np.ndarray) -> ModelFiles:
        return open_model(
            write_gguf(tmp_path / "model.gguf", config, tensors, extra_tensors={"rope_freqs.weight": values})
        )

    files = open_with(factors)
    assert files.spec.rope.frequency_factors == tuple(factors.tolist())
    assert "rope_freqs.weight" not in files.tensor_names()
    with pytest.raises(ModelFileError, match="4 rotary frequency factors; 8 are expected"):
        open_with(factors[:4])
    with pytest.raises(ModelFileError, match="not positive"):
        open_with(-factors)
    with pytest.raises(ModelFileError, match=r"F32 \[n\] is expected"):
        open_with(factors.reshape(2, 4))


def test_tied_output_is_read_from_the_file(tmp_path: Path) -> None:
    config = {**TINY_CONFIGS["qwen2"], "tie_word_embeddings": False}
    tensors = random_tensors(config)
    untied = open_model(write_gguf(tmp_path / "untied.gguf", config, tensors))
    assert not untied.spec.tie_word_embeddings
    np.testing.assert_array_equal(dequantize(untied.tensor("lm_head.weight")), tensors["lm_head.weight"])
    del tensors["lm_head.weight"]
    tied = open_model(write_gguf(tmp_path / "tied.gguf", config, tensors))
    assert tied.spec.tie_word_embeddings
    with pytest.raises(ModelFileError, match=r"lm_head\.weight is missing"):
        tied.tensor("lm_head.weight")
    # A tied folder may carry the copy all the same.
    tied_config = TINY_CONFIGS["qwen2"]
    copy = {**random_tensors(tied_config), "lm_head.weight": tensors["model.embed_tokens.weight"]}
    assert "lm_head.weight" not in open_model(write_folder(tmp_path / "copy", tied_config, copy)).tensor_names()


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_part_of_multimodal_gemma3(tmp_path: Path, prefix: str) -> None:
    text_config = TINY_CONFIGS["gemma3"]
    tensors = random_tensors(text_config)
    stored = {prefix + name.removeprefix("model."): weights for name, weights in tensors.items()}
    stored["vision_tower.vision_model.embeddings.weight"] = np.zeros((2, 2), np.float32)
    stored["model.multi_modal_projector.mm_input_projection_weight"] = np.zeros((2, 2), np.float32)
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text_config,
        "vision_config": {},
    }
    files = open_model(write_folder(tmp_path / "model", config, stored))
    assert_close(read_all(files), tensors)


@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "F16"), (np.float32, "F32")])
def test_folder_formats(tmp_path: Path, dtype: Any, name: str) -> None:
    config = TINY_CONFIGS["llama"]
    tensors = {key: weights.astype(dtype) for key, weights in random_tensors(config).items()}
    files = open_model(write_folder(tmp_path / "model", config, tensors))
    assert {files.tensor(key).format for key in files.tensor_names()} == {name}
    assert_close(read_all(files), {key: weights.astype(np.float32) for key, weights in tensors.items()})


def test_choice_of_what_to_open(tmp_path: Path) -> None:
    config = TINY_CONFIGS["qwen3"]
    tensors = random_tensors(config)
    with pytest.raises(ModelNotFoundError, match="no such file"):
        open_model(tmp_path / "absent")
    with pytest.raises(ModelNotFoundError, match=r"config\.json with safetensors, or one \.gguf"):
        open_model(tmp_path)
    write_gguf(tmp_path / "a.gguf", config, tensors)
    assert open_model(tmp_path).path == tmp_path / "a.gguf"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_model(tmp_path).path == tmp_path / "a.gguf"
    write_gguf(tmp_path / "b.gguf", config, tensors)
    with pytest.raises(ModelFileError, match=r"2 \.gguf files; name one of them: a\.gguf, b\.gguf"):
        open_model(tmp_path)
    write_folder(tmp_path, config, tensors)
    assert open_model(tmp_path).path == tmp_path


def _drop(name: str) -> Callable[[Weights], None]:
    return lambda tensors: tensors.__delitem__(name)


def _replace(name: str, shape: tuple[int, ...]) -> Callable[[Weights], None]:
    return lambda tensors: tensors.__setitem__(name, np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("change", "name", "problem"),
    [
        (_drop("model.norm.weight"), "model.norm.weight", r"model\.norm\.weight is missing"),
        (_replace("model.norm.weight", (65,)), "model.norm.weight", r"shape \[65\]; the configuration asks for \[64\]"),
        (
            _replace("model.layers.2.self_attn.k_proj.weight", (64, 64)),
            "model.layers.2.self_attn.k_proj.weight",
            r"shape \[64, 64\]; the configuration asks for \[32, 64\]",
        ),
    ],
)
@pytest.mark.parametrize("container", ["folder", "gguf"])
def test_tensor_missing_or_of_wrong_shape(
    tmp_path: Path, change: Callable[[Weights], None], name: str, problem: str, container: str
) -> None:
    config = TINY_CONFIGS["llama"]
    tensors = random_tensors(config)
    change(tensors)
    if container == "folder":
        files = open_model(write_folder(tmp_path, config, tensors))
    else:
        files = open_model(write_gguf(tmp_path / "model.gguf", config, tensors))
    with pytest.raises(ModelFileError, match=problem):
        files.tensor(name)


def test_tensor_that_nothing_would_use_is_refused(tmp_path: Path) -> None:
    config = TINY_CONFIGS["llama"]
    extra = "model.layers.0.self_attn.q_norm.weight"
    tensors = {**random_tensors(config), extra: np.ones(16, np.float32)}
    with pytest.raises(UnsupportedModelError, match=r"not part of a llama model.*q_norm"):
        open_model(write_folder(tmp_path / "folder", config, tensors))
    for name in ("blk.0.attn_sinks.weight", "model.norm.weight", "blk.7.attn_q.weight"):
        path = write_gguf(
            tmp_path / "model.gguf", config, random_tensors(config), extra_tensors={name: np.ones(16, np.float32)}
        )
        with pytest.raises(UnsupportedModelError, match="not part of a llama model"):
            open_model(path)
    buffers = {**random_tensors(config), "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    assert "rotary" not in str(open_model(write_folder(tmp_path / "buffers", config, buffers)).tensor_names())


def test_generation_defaults_and_template_of_both_containers(tmp_path: Path) -> None:
    config = {**TINY_CONFIGS["llama"], "eos_token_id": 3}
    tensors = random_tensors(config)
    folder = write_folder(tmp_path / "folder", config, tensors)
    (folder / "generation_config.json").write_text(
        json.dumps({"temperature": 0.7, "top_k": 20, "eos_token_id": [5, 3]})
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    files = open_model(folder)
    assert files.chat_template == "{{ messages }}"
    assert (files.generation_defaults.temperature, files.generation_defaults.top_k) == (0.7, 20)
    assert files.generation_defaults.eos_token_ids == (5, 3)

    metadata = {"tokenizer.chat_template": "{{ bos_token }}", "general.sampling.temp": 0.5}
    path = write_gguf(tmp_path / "model.gguf", config, tensors, metadata=metadata)
    files = open_model(path)
    assert files.chat_template == "{{ bos_token }}"
    assert files.generation_defaults.temperature == 0.5
    assert files.generation_defaults.eos_token_ids == (2,)
    for override in (folder, folder / "tokenizer.json"):
        assert open_model(path, tokenizer=str(override)).chat_template == "{{ messages }}"


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIGS["llama"]))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ModelFileError, match="pickled weights"):
        open_model(tmp_path)
    safetensors.numpy.save_file(random_tensors(TINY_CONFIGS["llama"]), tmp_path / "model.safetensors")
    assert open_model(tmp_path).spec.architecture == "llama"
