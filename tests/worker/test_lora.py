"""LoRA adapters in a model: against `peft`, and bit for bit against themselves in any company."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from pelton.core.errors import ConfigError, ModelFileError
from pelton.weights.channel_quantization import QuantizedFiles
from pelton.weights.lora import open_adapter
from pelton.weights.model_files import open_model
from pelton.worker.adapters import LoadedAdapters
from pelton.worker.kernels.cpu.backend import NativeKernels
from pelton.worker.kernels.ops import LoraSite
from pelton.worker.models.registry import Model, load_model
from tests.make_lora import ATTENTION, EVERYTHING, random_module, random_weights, save_adapter
from tests.worker.native import ISAS, native
from tests.worker.test_native_models import make_eager
from tests.worker.tiny_models import REFERENCE, VOCAB_SIZE, PagedModel, make_tiny, save_tiny

pytestmark = pytest.mark.torch

LENGTH = 70
MAX_RANK = 64
# What an adapter may be: options of `peft.LoraConfig`.
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
    "everything": {"r": 5, "lora_alpha": 20, "target_modules": EVERYTHING},
    "rank stabilized": {"r": 16, "lora_alpha": 4, "use_rslora": True, "target_modules": ["v_proj", "down_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"q_proj": 9, r"layers\.1\.mlp\.up_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.k_proj": 3, "up_proj": 1},
    },
    "some layers": {"r": 3, "lora_alpha": 3, "target_modules": ["gate_proj"], "layers_to_transform": [1]},
    "head": {"r": 6, "lora_alpha": 12, "target_modules": ["lm_head", "o_proj"]},
}
MODELS = ("llama", "llama-mha-bias", "qwen2", "qwen3-tied", "gemma2", "gemma3")


def prompt(seed: int = 0, length: int = LENGTH) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


def adapt(model: Model, folder: Path) -> Any:
    return model.kernels.make_adapter(open_adapter(folder, model.spec, MAX_RANK), model.lora_sites)


# Of a tied head peft adapts the embedding too.
@pytest.mark.parametrize(
    ("row", "name"), [(row, name) for row in MODELS for name in ADAPTERS if (row, name) != ("qwen3-tied", "head")]
)
def test_logits_equal_those_of_peft(tmp_path: Path, row: str, name: str) -> None:
    save_tiny(row, tmp_path / "model")
    adapted = save_adapter(make_tiny(row), tmp_path / "adapter", **ADAPTERS[name])
    with torch.inference_mode():
        expected = adapted(torch.tensor([prompt()])).logits[0]
        with adapted.disable_adapter():
            plain = adapted(torch.tensor([prompt()])).logits[0]
    assert (expected - plain).abs().max() > 0.1  # an adapter that says nothing proves nothing
    files = open_model(tmp_path / "model")
    for kernels in (REFERENCE, native(ISAS[0], 2, "float32")):
        model = load_model(files, kernels)
        paged = PagedModel(model)
        logits = paged.run(paged.add(prompt(), adapt(model, tmp_path / "adapter")), 33)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(paged.run(paged.add(prompt()), 33), plain, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A model, and adapters of it in float32 and bfloat16."""
    root = tmp_path_factory.mktemp("lora")
    save_tiny("qwen2", root / "model")
    paths = []
    for seed, name in enumerate(("everything", "attention", "patterns")):
        paths.append(root / name.replace(" ", "-"))
        dtype = torch.bfloat16 if name == "attention" else torch.float32
        save_adapter(make_tiny("qwen2"), paths[-1], seed=seed, dtype=dtype, **ADAPTERS[name])
    return root / "model", paths


def backends() -> list[Any]:
    return [REFERENCE, *(native(isa, 1 + index % 2) for index, isa in enumerate(ISAS))]


@pytest.mark.parametrize("kernels", backends(), ids=lambda kernels: kernels.name)
def test_company_and_chunks_give_the_same_bits(folders: tuple[Path, list[Path]], kernels: Any) -> None:
    """Two adapters of each other's company, the base, and every mixture of chunks and decodes: law 3."""
    model = load_model(open_model(folders[0]), kernels)
    adapters = [None, *(adapt(model, path) for path in folders[1])]
    work = [
        (prompt(seed, length), adapters[seed % len(adapters)]) for seed, length in enumerate([70, 1, 17, 64, 33, 2, 40])
    ]
    expected = []
    for tokens, adapter in work:
        alone = PagedModel(model)
        expected.append(alone.run(alone.add(tokens, adapter), 1000))
    mixed = PagedModel(model, seed=5)
    requests = [mixed.add(tokens, adapter) for tokens, adapter in work]
    chooser = random.Random(1)
    while active := [r for r in requests if r.num_computed_tokens < len(r.token_ids)]:
        chosen = chooser.sample(active, chooser.randint(1, len(active)))
        mixed.step([(request, chooser.choice([1, 1, 2, 7, 40])) for request in chosen])
    for request, logits in zip(requests, expected, strict=True):
        assert torch.equal(torch.cat(request.logits), logits)
    assert not torch.equal(expected[0][:1], expected[4][:1])


def test_the_program_gives_the_bits_of_single_ops(folders: tuple[Path, list[Path]]) -> None:
    """A step with adapters leaves the fused feed-forward, and its base rows have the bits of one without."""
    model = load_model(open_model(folders[0]), NativeKernels(2))
    adapter, runs = adapt(model, folders[1][0]), []
    for options in ({}, {"make_program": make_eager}):
        paged = PagedModel(model, kv_dtype="bfloat16", **options)
        requests = [paged.add(prompt(1, 40), adapter), paged.add(prompt(2, 50))]
        for chunk in (1, 30, 50):
            paged.step([(request, chunk) for request in requests])
        runs.append([torch.cat(request.logits) for request in requests])
    alone = PagedModel(model, kv_dtype="bfloat16")
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert torch.equal(runs[0][1], alone.run(alone.add(prompt(2, 50)), 50))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("isa", ISAS)
def test_native_products_equal_float64(isa: str, dtype: str) -> None:
    """Any widths and ranks, and rows of three adapters among rows of none."""
    kernels = native(isa, 2)
    rng = np.random.default_rng(0)
    for num_inputs, sizes, ranks in [(896, (128, 30, 70), (8, 3, 17)), (50, (7,), (1,)), (33, (64, 65), (64, 9))]:
        modules = tuple((f"m{i}", size) for i, size in enumerate(sizes))
        site = LoraSite(modules, num_inputs)
        x = rng.standard_normal((29, num_inputs), dtype=np.float32)
        y = rng.standard_normal((29, site.num_outputs), dtype=np.float32)
        expected = y.astype(np.float64)
        adapters, rows = [], rng.permutation(29)
        for seed, own in enumerate((rows[:11], rows[11:12], rows[12:20])):
            given = {
                name: random_module(name, rank, (size, num_inputs), seed=seed, dtype=dtype)
                for index, ((name, size), rank) in enumerate(zip(modules, ranks, strict=True))
                if index != seed or len(modules) == 1
            }
            column = 0
            for name, size in modules:
                if name in given:
                    a, b, scale = given[name].decoded
                    expected[own, column : column + size] += scale * (x[own].astype(np.float64) @ a.T) @ b.T
                column += size
            weights = random_weights({name: module.module for name, module in given.items()})
            adapters.append((kernels.make_adapter(weights, [site]), np.sort(own)))
        result = kernels.add_lora(y.copy(), x, 0, tuple(adapters))
        np.testing.assert_allclose(result, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
        untouched = rows[20:]
        np.testing.assert_array_equal(result[untouched], y[untouched])
        shuffled = kernels.add_lora(y.copy(), x, 0, tuple(adapters[::-1]))
        np.testing.assert_array_equal(shuffled, result)


def test_an_adapter_of_another_model_is_refused_by_the_kernels() -> None:
    kernels = native(ISAS[0])
    module = random_module("m", 4, (8, 16)).module
    adapter = kernels.make_adapter(random_weights({"m": module}), [LoraSite((("m", 8),), 16)])
    y, rows = np.zeros((2, 8), np.float32), np.array([0])
    for x, out, own in [
        (np.ones((2, 20), np.float32), y, rows),
        (np.ones((2, 16), np.float32), y[:, :4].copy(), rows),
        (np.ones((2, 16), np.float32), y, np.array([2])),
    ]:
        with pytest.raises(ValueError, match=r"fit|row"):
            kernels.add_lora(out, x, 0, ((adapter, own),))


def test_loaded_adapters_are_bounded_shared_and_freed(folders: tuple[Path, list[Path]]) -> None:
    model = load_model(open_model(folders[0]), REFERENCE)
    store = LoadedAdapters(model.spec, model.lora_sites, REFERENCE, max_loras=2, max_rank=16)
    first, second = (store.load(str(path)).result() for path in folders[1][:2])
    assert first.lora_id != second.lora_id
    assert store.load_now(str(folders[1][0])) == first  # the same content is there once
    with pytest.raises(ConfigError, match="max_loras"):
        store.load_now(str(folders[1][2]))
    store.remove(first.lora_id)
    assert store.get(first.lora_id) is None
    assert store.load_now(str(folders[1][2])).rank == 9
    small = LoadedAdapters(model.spec, model.lora_sites, REFERENCE, max_loras=2, max_rank=8)
    with pytest.raises(ModelFileError, match="rank 9, more than max_lora_rank allows"):
        small.load_now(str(folders[1][2]))
    store.close()


def test_the_versions_of_peft_that_are_read_are_those_that_are_tested(folders: tuple[Path, list[Path]]) -> None:
    config = json.loads((folders[1][0] / "adapter_config.json").read_text())
    assert config["peft_version"] == peft.__version__


@pytest.mark.parametrize("isa", ISAS)
def test_rows_without_an_adapter_keep_their_bits_where_weights_are_rounded_by_channel(
    folders: tuple[Path, list[Path]], isa: str
) -> None:
    """There the fused feed-forward layer rounds otherwise than its products one by one."""
    model = load_model(QuantizedFiles(open_model(folders[0]), "w8a8"), native(isa, 2))
    everything, attention = (adapt(model, path) for path in folders[1][:2])
    work = [(prompt(1, 30), everything), (prompt(2, 40), None), (prompt(3, 20), attention)]
    expected = []
    for tokens, adapter in work:
        alone = PagedModel(model, kv_dtype="bfloat16")
        expected.append(alone.run(alone.add(tokens, adapter), 7))
    mixed = PagedModel(model, kv_dtype="bfloat16")
    requests = [mixed.add(tokens, adapter) for tokens, adapter in work]
    for chunk in (1, 5, 40, 40):
        mixed.step([(request, chunk) for request in requests])
    for request, logits in zip(requests, expected, strict=True):
        assert torch.equal(torch.cat(request.logits), logits)
