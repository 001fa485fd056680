"""Real weights: logits against `transformers` with the same decoded weights, law 3, memory."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from pelton.core.model_spec import ModelSpec
from pelton.weights.catalog import resolve_model
from pelton.weights.config import ModelConfig
from pelton.weights.dequantize import dequantize
from pelton.weights.model_files import open_model
from pelton.weights.tensors import ModelFiles
from pelton.weights.tokenizer import load_tokenizer
from pelton.worker.models.registry import Model, load_model
from tests.worker.tiny_models import REFERENCE, PagedModel

pytestmark = [pytest.mark.torch, pytest.mark.model]

TEXTS = [
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n    pivot = items[0]\n",
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Japan is",
    "Überall lagen Bücher, 図書館のように, и никто их не читал. 1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89,",
]
MAX_DIFFERENCE = 5e-4  # of logits around 20


@pytest.fixture(scope="module", params=["default", "gemma"])
def model_path(request: pytest.FixtureRequest) -> Path:
    if request.param == "default":
        path: Path = request.getfixturevalue("default_model_path")
        return path
    given = os.environ.get("PELTON_TEST_GEMMA")
    return Path(given) if given else resolve_model(ModelConfig(model="gemma-3-270m"))


@pytest.fixture(scope="module")
def model(model_path: Path) -> Model:
    return load_model(open_model(model_path), REFERENCE)


@pytest.fixture(scope="module")
def prompts(model_path: Path) -> list[list[int]]:
    """Some text, and one prompt past Gemma's window of 512 tokens."""
    tokenizer = load_tokenizer(model_path)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    return [*prompts, tokenizer.encode("\n".join(TEXTS * 6))[:600]]


def reference_model(files: ModelFiles) -> transformers.PreTrainedModel:
    """The model of `transformers` with the file's weights, decoded to float32."""
    spec = files.spec
    config = reference_config(spec)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name: torch.from_numpy(dequantize(files.tensor(name))) for name in files.tensor_names()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    assert not [name for name, parameter in model.named_parameters() if parameter.is_meta]
    # Rotary tables are no weights: they were made on the meta device, with the model.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config)
    if hasattr(model.model.embed_tokens, "embed_scale"):
        model.model.embed_tokens.embed_scale = torch.tensor(spec.embedding_scale)
    return model.eval()


def reference_config(spec: ModelSpec) -> transformers.PretrainedConfig:
    return _qwen2_config(spec) if spec.architecture == "qwen2" else _gemma3_config(spec)


def _qwen2_config(spec: ModelSpec) -> transformers.PretrainedConfig:
    return transformers.Qwen2Config(
        **_sizes(spec), rope_parameters={"rope_type": "default", "rope_theta": spec.rope.theta}
    )


def _gemma3_config(spec: ModelSpec) -> transformers.PretrainedConfig:
    assert spec.rope_local is not None
    windowed = {layer: group.sliding_window for group in spec.kv_groups for layer in group.layer_ids}
    return transformers.Gemma3TextConfig(
        **_sizes(spec),
        head_dim=spec.head_dim,
        query_pre_attn_scalar=spec.head_dim,
        sliding_window=max(window or 0 for window in windowed.values()),
        layer_types=["sliding_attention" if windowed[layer] else "full_attention" for layer in range(spec.num_layers)],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": spec.rope.theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": spec.rope_local.theta},
        },
    )


def _sizes(spec: ModelSpec) -> dict[str, object]:
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "max_position_embeddings": spec.max_model_len,
        "rms_norm_eps": spec.rms_norm_eps,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "attn_implementation": "eager",
    }


def test_logits_equal_transformers(model: Model, model_path: Path, prompts: list[list[int]]) -> None:
    reference = reference_model(open_model(model_path))
    paged = PagedModel(model, num_blocks=1000)
    for prompt in prompts:
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0]
        logits = paged.run(paged.add(prompt), 1000)
        assert expected.abs().max() > 10
        assert (logits - expected).abs().max() < MAX_DIFFERENCE
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_chunks_and_company_give_the_same_bits(model: Model, prompts: list[list[int]]) -> None:
    alone = PagedModel(model, num_blocks=1000)
    prompts = [*prompts, prompts[0][:30], prompts[1][:7]]
    expected = [alone.run(alone.add(prompt), 1000) for prompt in prompts]
    paged = PagedModel(model, num_blocks=1000, seed=1)
    requests = [paged.add(prompt) for prompt in prompts]
    chooser = random.Random(0)
    while any(request.num_computed_tokens < len(request.token_ids) for request in requests):
        paged.step([(request, chooser.choice([1, 3, 33, 100])) for request in requests if chooser.random() < 0.7])
    for request, logits in zip(requests, expected, strict=True):
        assert torch.equal(torch.cat(request.logits), logits)


_MEMORY_PROBE = """
import sys
from pathlib import Path
from pelton.weights.catalog import resolve_model
from pelton.weights.config import ModelConfig
from pelton.weights.model_files import open_model
from pelton.worker.kernels.ops import make_kernels
from pelton.worker.models.registry import load_model

def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

files = open_model(Path(sys.argv[1]))
kernels = make_kernels("reference")
before = memory("RssAnon:")
model = load_model(files, kernels)
print(memory("RssAnon:") - before, memory("VmHWM:") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_leaves_one_copy_of_the_weights(model_path: Path) -> None:
    files = open_model(model_path)
    num_values = 0
    for name in files.tensor_names():
        # A head is decoded; a table that is only looked up stays in the file.
        if name != "model.embed_tokens.weight" or files.spec.tie_word_embeddings:
            tensor = files.tensor(name)
            num_values += torch.Size(tensor.shape).numel()
    probe = subprocess.run(
        [sys.executable, "-c", _MEMORY_PROBE, str(model_path)], capture_output=True, text=True, check=True
    )
    held, peak = map(int, probe.stdout.split())
    assert 0.99 * 4 * num_values < held < 1.02 * 4 * num_values + 50e6
    # At the peak, beside the weights: the file's own pages, and a buffer for one matrix.
    assert peak < 1.02 * 4 * num_values + files.path.stat().st_size + 300e6


START = """
import hashlib, sys, threading
from pathlib import Path
import numpy as np
from pelton.weights.config import ModelConfig
from pelton.weights.model_files import open_model
from pelton.worker.config import WorkerConfig
from pelton.worker.executors import build_worker
from pelton.worker.kernels.ops import make_kernels

config = WorkerConfig(weight_cache_dir=sys.argv[2])
kernels = make_kernels("native", num_threads=2)
model = build_worker.load_weights(open_model(Path(sys.argv[1])), ModelConfig(), config, kernels)
for thread in threading.enumerate():
    if thread.name in ("pelton-weight-cache", "pelton-weight-copy"):
        thread.join()
(kept,) = Path(sys.argv[2]).glob("*.weights")
hidden = np.linspace(-1, 1, 3 * model.spec.hidden_size, dtype=np.float32).reshape(3, -1)
logits = model.compute_logits(kernels, hidden)
print(type(kernels._loaded_weights).__name__, sys.argv[2] in Path("/proc/self/maps").read_text(), kept.stat().st_ino)
print(hashlib.sha256(np.asarray(logits)).hexdigest())
"""


def test_weights_are_kept_for_the_next_start(default_model_path: Path, tmp_path: Path) -> None:
    """The second start takes the first one's file, and ends up with memory of its own all the same."""
    command = [sys.executable, "-c", START, str(default_model_path), str(tmp_path)]
    starts = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(2)]
    assert [weights for weights, *_ in starts] == ["CollectedWeights", "MappedWeights"]
    assert [is_mapped for _, is_mapped, *_ in starts] == ["False", "False"]
    assert starts[0][2:] == starts[1][2:]
