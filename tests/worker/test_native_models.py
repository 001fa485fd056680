"""Whole models on native kernels: close to the reference backend, and law 3 bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from pelton.weights.channel_quantization import CHANNEL_QUANTIZATIONS, QuantizedFiles
from pelton.weights.config import ModelConfig
from pelton.weights.model_files import open_model
from pelton.weights.tokenizer import load_tokenizer
from pelton.worker.config import WorkerConfig
from pelton.worker.executors.build_worker import load_weights
from pelton.worker.kernels.cpu import pelton_cpu
from pelton.worker.kernels.cpu.backend import NativeKernels
from pelton.worker.kernels.cpu.recorder import Recorder, Value
from pelton.worker.kernels.eager import EagerProgram
from pelton.worker.kv_storage import KVStorage
from pelton.worker.models.registry import Model, attention_shapes, compile_model, load_model
from tests.weights.make_compressed import LAYOUTS, write_compressed
from tests.weights.make_models import TINY_CONFIGS, VOCABULARY, random_tensors, write_gguf
from tests.worker.native import ISAS, native
from tests.worker.test_models_real import TEXTS
from tests.worker.tiny_models import REFERENCE, PagedModel

pytestmark = pytest.mark.torch

LENGTH = 150  # past the windows of the tiny models, and past two tiles of attention
QUANTIZED = gguf.GGMLQuantizationType
# Architecture and format of the matrices.
ROWS = [
    ("llama", QUANTIZED.Q8_0),
    ("mistral", QUANTIZED.Q8_0),
    ("qwen2", QUANTIZED.Q5_1),
    ("qwen3", QUANTIZED.Q4_0),
    ("gemma2", QUANTIZED.Q5_0),
    ("gemma3", QUANTIZED.Q8_0),
    ("gemma3", QUANTIZED.Q4_1),
]


def prompt(seed: int = 0, length: int = LENGTH) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=length)


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: f"{row[0]}-{row[1].name}")
def tiny_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, quantized = request.param
    config = TINY_CONFIGS[architecture]
    tensors = random_tensors(config)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "embed" not in name:
            tensor *= tensor.shape[1] ** -0.5
        elif tensor.ndim == 1:
            tensor *= 0.3
            if name.endswith("norm.weight") and not architecture.startswith("gemma"):
                tensor += 1.0
    return write_gguf(tmp_path_factory.mktemp("tiny") / "model.gguf", config, tensors, quantized=quantized)


def paged(model: Model, kv_dtype: str, seed: int = 0) -> PagedModel:
    return PagedModel(model, num_blocks=1000, seed=seed, kv_dtype=kv_dtype)


def all_logits(model: Model, kv_dtype: str, token_ids: list[int], chunk: int = 1000) -> torch.Tensor:
    runner = paged(model, kv_dtype)
    return runner.run(runner.add(token_ids), chunk)


def mean_kl(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Of each position's distribution over the next token, in nats."""
    p, q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("isa", ISAS)
def test_logits_are_close_to_the_reference(tiny_path: Path, isa: str) -> None:
    files = open_model(tiny_path)
    expected = all_logits(load_model(files, REFERENCE), "float32", prompt())
    for kv_dtype in ("float32", "bfloat16"):
        logits = all_logits(load_model(files, native(isa)), kv_dtype, prompt())
        assert logits.dtype is torch.float32
        error = (logits - expected).square().mean().sqrt() / expected.std()
        assert 0 < error < 0.03  # 0.005 to 0.014 when written
        assert mean_kl(expected, logits) < 2e-3  # 4e-4 at most


@pytest.mark.parametrize("isa", ISAS)
def test_float32_activations_are_those_of_the_reference(tiny_path: Path, isa: str) -> None:
    files = open_model(tiny_path)
    expected = all_logits(load_model(files, REFERENCE), "float32", prompt())
    logits = all_logits(load_model(files, native(isa, 1, "float32")), "float32", prompt())
    assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("layout", ["gptq", "awq", "w8a8", "w8a8, float32 scales", "w4a16, zeros"])
def test_compressed_models_are_close_to_the_reference(tmp_path: Path, layout: str) -> None:
    write_compressed(tmp_path, LAYOUTS[layout], "qwen3")
    files = open_model(tmp_path)
    expected = all_logits(load_model(files, REFERENCE), "float32", prompt())
    exact = all_logits(load_model(files, native(ISAS[0], 1, "float32")), "float32", prompt())
    assert (exact - expected).abs().max() <= 2e-5 * expected.abs().max()
    for isa in ISAS:
        rounded = all_logits(load_model(files, native(isa)), "bfloat16", prompt())
        assert 0 < (rounded - expected).square().mean().sqrt() / expected.std() < 0.03


@pytest.mark.parametrize("quantization", CHANNEL_QUANTIZATIONS)
def test_quantization_reaches_the_products(tiny_path: Path, quantization: str) -> None:
    """The output, too, where it is the embedding. The reference rounds no activations."""
    files = open_model(tiny_path)
    settings = ModelConfig(quantization=quantization)
    plain = all_logits(load_model(files, REFERENCE), "float32", prompt())
    expected = all_logits(load_model(QuantizedFiles(files, quantization), REFERENCE), "float32", prompt())
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    exact = WorkerConfig(activation_dtype="float32", enable_weight_cache=False)
    logits = all_logits(load_weights(files, settings, exact, native(ISAS[0], 1, "float32")), "float32", prompt())
    assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()
    for isa in ISAS:
        loaded = load_weights(files, settings, WorkerConfig(enable_weight_cache=False), native(isa))
        rounded = all_logits(loaded, "bfloat16", prompt())
        assert 0 < (rounded - expected).square().mean().sqrt() / expected.std() < 0.05


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
def test_chunks_and_company_give_the_same_bits(tiny_path: Path, isa: str, kv_dtype: str) -> None:
    files = open_model(tiny_path)
    model = load_model(files, native(isa))
    prompts = [prompt(seed, length) for seed, length in enumerate([LENGTH, 1, 17, 64, 65, 128])]
    expected = [all_logits(model, kv_dtype, tokens) for tokens in prompts]
    for chunk in (1, 3, 16, 77):
        assert torch.equal(all_logits(model, kv_dtype, prompts[0], chunk), expected[0]), chunk
    threaded = load_model(files, native(isa, 2))
    assert torch.equal(all_logits(threaded, kv_dtype, prompts[0]), expected[0])
    assert_mixtures_equal(paged(threaded, kv_dtype, seed=3), prompts, expected)


def assert_mixtures_equal(runner: PagedModel, prompts: list[list[int]], expected: list[torch.Tensor]) -> None:
    """Prefills, chunks and decodes in every mixture, each as if it were alone."""
    chooser = random.Random(1)
    requests = [runner.add(tokens) for tokens in prompts]
    while active := [r for r in requests if r.num_computed_tokens < len(r.token_ids)]:
        chosen = chooser.sample(active, chooser.randint(1, len(active)))
        runner.step([(request, chooser.choice([1, 1, 2, 7, 40, 150])) for request in chosen])
    for request, logits in zip(requests, expected, strict=True):
        assert torch.equal(torch.cat(request.logits), logits)


def test_the_program_gives_the_bits_of_single_ops(tiny_path: Path) -> None:
    """However slots are shared, and whichever rows the head takes."""
    model = load_model(open_model(tiny_path), native(ISAS[0], 2))
    runs = []
    for make_program in (compile_model, make_eager):
        runner = PagedModel(model, num_blocks=1000, kv_dtype="bfloat16", make_program=make_program)
        requests = [runner.add(prompt(seed, length)) for seed, length in enumerate([LENGTH, 1, 40])]
        for chunk in (1, 50, 3, 200):
            runner.step([(request, chunk) for request in requests])
        runs.append((torch.cat([logits for request in requests for logits in request.logits]), runner.kv._data))
        rows = np.array([2, 0, 2])
        expected = runner.program.logits(np.arange(3))[rows]
        np.testing.assert_array_equal(runner.program.logits(rows), expected)
    assert torch.equal(runs[0][0], runs[1][0])
    np.testing.assert_array_equal(runs[0][1], runs[1][1])


def make_eager(model: Model, kv: KVStorage) -> EagerProgram:
    return EagerProgram(model.kernels, model, attention_shapes(model.spec, kv.block_size), kv.layer_caches())


def test_matrices_stay_packed(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product of the model is a packed one: none is decoded unnoticed."""
    seen: list[Any] = []
    original = Recorder.linear

    def linear(self: Recorder, x: Value, weight: Any, bias: Any = None) -> Value:
        seen.append(weight)
        return original(self, x, weight, bias)

    monkeypatch.setattr(Recorder, "linear", linear)
    files = open_model(tiny_path)
    paged(load_model(files, native(ISAS[0])), "bfloat16")
    assert len(seen) == 4 * files.spec.num_layers + 1
    assert all(isinstance(weight, pelton_cpu.LinearWeight) for weight in seen)


@pytest.mark.model
def test_the_real_model_is_close_to_the_reference(default_model_path: Path) -> None:
    files, tokenizer = open_model(default_model_path), load_tokenizer(default_model_path)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    prompts.append(tokenizer.encode("\n".join(TEXTS * 6))[:300])
    reference = load_model(files, REFERENCE)
    expected = [all_logits(reference, "float32", tokens) for tokens in prompts]
    del reference
    model = load_model(files, NativeKernels(2))
    results = [all_logits(model, "bfloat16", tokens) for tokens in prompts]
    agreement = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(results, expected, strict=True)])
    divergence = mean_kl(torch.cat(expected), torch.cat(results))
    assert agreement.float().mean() >= 0.97  # 0.995 when written
    assert divergence < 4e-3  # 8.4e-4
    assert_mixtures_equal(paged(model, "bfloat16", seed=1), prompts, results)
