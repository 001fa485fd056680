"""What LoRA adapters add to a step: decoding requests and prompts, of the base and of adapters, in one batch.

    python benchmarks/lora.py --model MODEL [--requests 16] [--rank 16] [--dtype bfloat16] [--targets all]

The adapters are random, in peft's format, of the model's shapes. Cases take turns within one process, round after
round, so that what else the machine does falls on all of them; a case's figure is the median over its rounds of the
executor's time a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import tempfile
from pathlib import Path

import numpy as np

from pelton import LLM, SamplingParams
from pelton.core.model_spec import ModelSpec
from pelton.weights.catalog import resolve_model
from pelton.weights.config import ModelConfig
from pelton.weights.lora.adapter import module_shapes
from pelton.weights.model_files import open_model

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = {"attention": ATTENTION, "all": (*ATTENTION, "gate_proj", "up_proj", "down_proj")}
NUM_ADAPTERS = 4
PROMPT_TOKENS = 192


def write_adapter(folder: Path, spec: ModelSpec, targets: tuple[str, ...], rank: int, dtype: str, seed: int) -> None:
    """Random matrices as `peft` saves them."""
    rng = np.random.default_rng(seed)
    header: dict[str, object] = {}
    parts: list[bytes] = []
    size = 0
    for name, (num_outputs, num_inputs) in module_shapes(spec):
        if not name.endswith(targets):
            continue
        for side, shape in (("A", (rank, num_inputs)), ("B", (num_outputs, rank))):
            values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
            data = (
                (values.view(np.uint32) >> 16).astype(np.uint16).tobytes() if dtype == "bfloat16" else values.tobytes()
            )
            header[f"base_model.model.{name}.lora_{side}.weight"] = {
                "dtype": "BF16" if dtype == "bfloat16" else "F32",
                "shape": shape,
                "data_offsets": (size, size + len(data)),
            }
            size += len(data)
            parts.append(data)
    folder.mkdir()
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def cases(num_requests: int) -> dict[str, list[str | None]]:
    """Name -> the adapter of each request."""
    adapters = [f"a{index % NUM_ADAPTERS}" for index in range(num_requests)]
    return {
        "base": [None] * num_requests,
        "one request of 16 adapted": [*adapters[:1], *[None] * (num_requests - 1)],
        "half base, half on 4 adapters": [adapter if index % 2 else None for index, adapter in enumerate(adapters)],
        "all on one adapter": ["a0"] * num_requests,
        "all on 4 adapters": [*adapters],
    }


def step_ms(llm: LLM, prompts: list[list[int]], num_tokens: int, loras: list[str | None]) -> float:
    """The executor's time a step while `prompts` get `num_tokens` each."""
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    before = llm.stats
    llm.generate(prompts, sampling, lora=loras)
    after = llm.stats
    num_steps = after.num_steps_total - before.num_steps_total
    return 1000 * (after.execute_s_total - before.execute_s_total) / num_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ModelConfig().model)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--targets", choices=tuple(TARGETS), default="all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    spec = open_model(resolve_model(ModelConfig(model=arguments.model))).spec
    rng = np.random.default_rng(0)

    def prompts(num_tokens: int) -> list[list[int]]:
        return rng.integers(1000, 4000, (arguments.requests, num_tokens)).tolist()

    with tempfile.TemporaryDirectory() as root:
        names = [f"a{index}" for index in range(NUM_ADAPTERS)]
        for seed, name in enumerate(names):
            folder = Path(root) / name
            write_adapter(folder, spec, TARGETS[arguments.targets], arguments.rank, arguments.dtype, seed)
        settings = {"max_model_len": 512, "enable_prefix_caching": False, "threads": arguments.threads}
        modules = tuple(f"{name}={root}/{name}" for name in names)
        with LLM(arguments.model, lora_modules=modules, max_lora_rank=arguments.rank, **settings) as llm:
            print_figures(llm, arguments, prompts)


def print_figures(llm: LLM, arguments: argparse.Namespace, prompts: object) -> None:
    work = {"decode": (4, arguments.tokens), "prompts": (PROMPT_TOKENS, 1)}
    figures: dict[tuple[str, str], list[float]] = {}
    for round_index in range(arguments.rounds + 1):
        for kind, (num_prompt_tokens, num_tokens) in work.items():
            if kind == "prompts" and round_index % 2:
                continue
            for name, loras in cases(arguments.requests).items():
                took_ms = step_ms(llm, prompts(num_prompt_tokens), num_tokens, loras)  # type: ignore[operator]
                if round_index:  # the first one warms up
                    figures.setdefault((kind, name), []).append(took_ms)
    shape = f"{arguments.requests} requests, rank {arguments.rank}, {arguments.targets} matrices, {arguments.dtype}"
    print(f"{shape}; executor's ms a step, median of rounds")
    for kind in work:
        base_ms = statistics.median(figures[kind, "base"])
        for (of_kind, name), values in figures.items():
            if of_kind == kind:
                median_ms = statistics.median(values)
                low, high = min(values), max(values)
                print(f"  {kind:<8} {name:<32} {median_ms:7.2f} ({low:.2f} to {high:.2f})  {median_ms / base_ms:5.2f}x")


if __name__ == "__main__":
    main()
