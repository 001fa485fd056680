"""Every architecture against `transformers`, and against itself however the work is cut."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from pelton.core.errors import ModelFileError, UnsupportedModelError
from pelton.core.model_spec import ModelSpec, RopeSpec, make_kv_groups
from pelton.weights.model_files import open_model
from pelton.worker.kernels.ops import make_kernels
from pelton.worker.models.registry import ARCHITECTURES, Model, load_model, make_dummy_model
from tests.worker.tiny_models import REFERENCE, TINY_MODELS, VOCAB_SIZE, PagedModel, save_tiny

pytestmark = pytest.mark.torch

LENGTH = 150  # past every window, past a chunk of attention, past the original length of scaled ropes


@pytest.fixture(scope="module", params=list(TINY_MODELS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, torch.Tensor]:
    """A model loaded from files, and the logits [LENGTH, V] of `transformers` for `prompt()`."""
    folder = tmp_path_factory.mktemp("tiny")
    reference = save_tiny(request.param, folder)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt()])).logits[0]
    return load_model(open_model(folder), REFERENCE), expected


def prompt(seed: int = 0, length: int = LENGTH) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


def test_every_architecture_has_a_row() -> None:
    assert {model_type.removesuffix("_text") for model_type, _ in TINY_MODELS.values()} == set(ARCHITECTURES)


def test_logits_equal_transformers(tiny: tuple[Model, torch.Tensor]) -> None:
    model, expected = tiny
    paged = PagedModel(model)
    logits = paged.run(paged.add(prompt()), LENGTH)
    assert logits.dtype is torch.float32
    assert expected.abs().max() > 1.0  # a model that says nothing proves nothing
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 16, 77])
def test_chunks_give_the_same_bits(tiny: tuple[Model, torch.Tensor], chunk: int) -> None:
    model, _ = tiny
    paged = PagedModel(model)
    whole = paged.run(paged.add(prompt()), LENGTH)
    assert torch.equal(paged.run(paged.add(prompt()), chunk), whole)


@pytest.mark.parametrize("block_size", [1, 5, 16, 300])
def test_any_block_size_gives_the_same_bits(tiny: tuple[Model, torch.Tensor], block_size: int) -> None:
    model, _ = tiny
    runs = []
    for size in (8, block_size):
        paged = PagedModel(model, num_blocks=2000 if size < 8 else 200, block_size=size)
        runs.append(paged.run(paged.add(prompt()), 60))
    assert torch.equal(*runs)


def test_mixed_batches_give_the_same_bits(tiny: tuple[Model, torch.Tensor]) -> None:
    """Prefills, chunks and decodes of eight requests in every mixture, each as if it were alone."""
    model, _ = tiny
    chooser = random.Random(1)
    prompts = [prompt(seed, length) for seed, length in enumerate([150, 1, 2, 17, 64, 65, 128, 140])]
    alone = PagedModel(model, num_blocks=2000)
    expected = [alone.run(alone.add(tokens), LENGTH) for tokens in prompts]
    paged = PagedModel(model, num_blocks=2000, seed=2)
    requests = [paged.add(tokens) for tokens in prompts]
    while any(request.num_computed_tokens < len(request.token_ids) for request in requests):
        active = [r for r in requests if r.num_computed_tokens < len(r.token_ids)]
        chosen = chooser.sample(active, chooser.randint(1, len(active)))
        paged.step([(request, chooser.choice([1, 1, 2, 7, 40, 150])) for request in chosen])
    for request, logits in zip(requests, expected, strict=True):
        assert torch.equal(torch.cat(request.logits), logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("row", ["qwen2", "gemma2", "gemma3"])
def test_narrow_dtypes_stay_close_and_keep_law_3(row: str, dtype: str, tmp_path: Path) -> None:
    save_tiny(row, tmp_path)
    logits = []
    for run_dtype, chunk in (("float32", 64), (dtype, 64), (dtype, 1)):
        paged = PagedModel(load_model(open_model(tmp_path), make_kernels("reference", run_dtype)))
        logits.append(paged.run(paged.add(prompt()), chunk))
    assert logits[1].dtype is torch.float32
    assert torch.equal(logits[1], logits[2])
    difference = (logits[1] - logits[0]).abs().mean() / logits[0].abs().mean()
    assert 0 < difference < (0.05 if dtype == "bfloat16" else 0.01)


class AlteredFiles:
    """A model's files with one tensor gone or cut short."""

    def __init__(self, folder: Path, name: str, *, missing: bool) -> None:
        self._files = open_model(folder)
        self.spec, self.path = self._files.spec, self._files.path
        self.generation_defaults, self.chat_template = self._files.generation_defaults, None
        self._name, self._missing = name, missing

    def tensor_names(self) -> list[str]:
        return self._files.tensor_names()

    def tensor(self, name: str):
        tensor = self._files.tensor(name)
        if name != self._name:
            return tensor
        if self._missing:
            raise ModelFileError(self.path, f"tensor {name} is missing")
        return type(tensor)(name, (tensor.shape[0] - 1, *tensor.shape[1:]), tensor.format, tensor.data[:-4])


@pytest.mark.parametrize("missing", [True, False])
@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.k_proj.bias", "model.norm.weight"],
)
def test_bad_tensors_are_named(name: str, missing: bool, tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path)
    with pytest.raises(ModelFileError, match=name):
        load_model(AlteredFiles(tmp_path, name, missing=missing), REFERENCE)


def make_spec(architecture: str) -> ModelSpec:
    return ModelSpec(
        architecture=architecture,
        num_layers=3,
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=VOCAB_SIZE,
        max_model_len=256,
        rms_norm_eps=1e-6,
        rope=RopeSpec(theta=10_000.0, rotary_dim=8),
        kv_groups=make_kv_groups([None] * 3),
    )


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_dummy_models_are_finite_and_repeatable(architecture: str) -> None:
    logits = []
    for _ in range(2):
        paged = PagedModel(make_dummy_model(make_spec(architecture), REFERENCE))
        logits.append(paged.run(paged.add(prompt()), 64))
    assert torch.equal(*logits)
    assert logits[0].isfinite().all()
    assert logits[0].argmax(-1).unique().numel() > 10


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="mamba"):
        make_dummy_model(make_spec("mamba"), REFERENCE)
