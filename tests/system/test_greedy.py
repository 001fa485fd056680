"""Greedy output of the real model equals that of transformers on the same dequantized weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from pelton import LLM, SamplingParams

pytestmark = pytest.mark.model

NUM_OUTPUT_TOKENS = 64
PROMPTS = [
    "def fibonacci(n):\n",
    "The capital of France is",
    "import numpy as np\n\ndef softmax(x):",
    "<|im_start|>user\nWhat is a B-tree?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou answer in one word.<|im_end|>\n<|im_start|>user\nColour of the sky?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "SELECT name, count(*) FROM users",
    "人工智能的未来",
    "Однажды в студёную зимнюю пору",
    "العلم نور",
    "1, 1, 2, 3, 5, 8, 13,",
    '{"name": "Ada", "age":',
    "#include <stdio.h>\n\nint main(void) {\n",
    "   \n\t  leading white space",
    "🙂🙃🚀",
    "A" * 200,
    "Q: 17 * 23 = ?\nA:",
    "fn main() {\n    let mut v: Vec<u32> =",
    "The quick brown fox jumps over the lazy dog. " * 12,
    "Dear Sir or Madam,\n\nI am writing to",
    "class Node:\n    def __init__(self, value, next=None):",
]


def test_greedy_text_equals_transformers(default_model_path: Path) -> None:
    """Transformers would choose each of our tokens, given those before it: so it writes the same text."""
    sampling = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    # The reference kernels compute in float32 as transformers does; native ones quantize activations.
    with LLM(str(default_model_path), max_model_len=1024, kernel_backend="reference") as llm:
        answers = llm.generate(PROMPTS, sampling)

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        default_model_path.parent,
        gguf_file=default_model_path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        written = answer.sequences[0].token_ids
        assert len(written) == NUM_OUTPUT_TOKENS
        context = torch.tensor([[*answer.prompt_token_ids, *written]])
        with torch.inference_mode():
            logits = model(context).logits[0, len(answer.prompt_token_ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == written, prompt
