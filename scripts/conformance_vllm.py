"""Tests of vLLM and of llama.cpp's server, run as black boxes against Pelton.

    python scripts/conformance_vllm.py --suite vllm --checkout DIR --model MODEL --tokenizer DIR --output FILE
    python scripts/conformance_vllm.py --suite llama.cpp --checkout DIR --model MODEL --output FILE

`DIR` is a checkout of the suite's own repository; nothing of it is kept here. The output gets one JSON object a line
for every test: its name, its outcome and why; files named by `--only` replace what the output says of them.
conformance_plugin.py is what the tests see instead of vLLM; docs/conformance-vllm-llama.md says what came out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from conformance_verdicts import NOT_APPLICABLE, REFUSED, verdict_of

VLLM_FILES = (
    "entrypoints/openai/chat_completion/test_chat.py",
    "entrypoints/openai/chat_completion/test_chat_completion.py",
    "entrypoints/openai/chat_completion/test_chat_echo.py",
    "entrypoints/openai/chat_completion/test_chat_logit_bias_validation.py",
    "entrypoints/openai/chat_completion/test_completion_with_function_calling.py",
    "entrypoints/openai/chat_completion/test_enable_force_include_usage.py",
    "entrypoints/openai/chat_completion/test_extra_content_fields.py",
    "entrypoints/openai/chat_completion/test_include_reasoning.py",
    "entrypoints/openai/chat_completion/test_logprob_token_ids.py",
    "entrypoints/openai/chat_completion/test_root_path.py",
    "entrypoints/openai/chat_completion/test_thinking_token_budget.py",
    "entrypoints/openai/completion/test_completion.py",
    "entrypoints/openai/completion/test_prompt_validation.py",
    "entrypoints/openai/completion/test_token_in_token_out.py",
    "entrypoints/openai/models/test_models.py",
    "entrypoints/openai/test_chunked_prompt.py",
    "entrypoints/openai/test_return_token_ids.py",
    "entrypoints/openai/test_return_tokens_as_ids.py",
    "entrypoints/openai/responses/test_basic.py",
    "entrypoints/openai/responses/test_function_call.py",
    "entrypoints/openai/responses/test_simple.py",
    "entrypoints/openai/responses/test_stateful.py",
    "entrypoints/openai/responses/test_structured_output.py",
    "entrypoints/anthropic/test_messages.py",
    "entrypoints/serve/tokenize/test_tokenization.py",
    "entrypoints/serve/instrumentator/test_basic.py",
    "entrypoints/serve/instrumentator/test_metrics.py",
    "entrypoints/serve/lora/test_lora_adapters.py",
    "entrypoints/serve/middleware/test_optional_middleware.py",
    "entrypoints/pooling/basic/test_truncation.py",
    "entrypoints/pooling/embed/test_online.py",
    "entrypoints/pooling/scoring/test_bi_encoder_online.py",
    "entrypoints/pooling/scoring/test_cross_encoder_online.py",
    "tool_use/test_chat_completions.py",
    "tool_use/test_parallel_tool_calls.py",
    "tool_use/test_tool_calls.py",
)
LLAMA_FOLDER = "tools/server/tests"
LLAMA_NAMES = (
    "tinyllama-2",
    "gpt-3.5-turbo",
    "gpt-3.5-turbo-instruct",
    "text-embedding-3-small",
    "gpt-4.1",
    "davinci-002",
    "test",
)


def run_vllm(checkout: Path, names: list[str], environment: dict[str, str], timeout_s: float) -> None:
    for name in names:
        folder = name.split("/")[0]
        run_pytest(
            [f"tests/{name}", f"--confcutdir=tests/{folder}", "-o", "asyncio_mode=auto", *OPTIONS.get(folder, ())],
            checkout,
            environment,
            timeout_s,
        )


# Hermes is the format of the model that is served; each other one is a server of its own, with a model of its own.
OPTIONS = {"tool_use": ("--models", "hermes")}


def run_llama(checkout: Path, names: list[str], environment: dict[str, str], timeout_s: float) -> None:
    """In the suite's external-server mode: it starts nothing, and every test asks the one server at PORT."""
    from conformance_plugin import PeltonServer

    with PeltonServer(LLAMA_NAMES[0], ["--served-model-name", *LLAMA_NAMES]) as server:
        environment = environment | {"DEBUG_EXTERNAL": "1", "PORT": str(server.port)}
        for name in names:
            run_pytest([f"unit/{name}"], checkout / LLAMA_FOLDER, environment, timeout_s)


def run_pytest(arguments: list[str], folder: Path, environment: dict[str, str], timeout_s: float) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "conformance_plugin"]
    command += ["-k", environment["CONFORMANCE_KEYWORD"]]
    try:
        subprocess.run([*command, *arguments], cwd=folder, env=environment, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        print(f"{arguments[0]} took more than {timeout_s:g} s", file=sys.stderr)


def read_results(path: Path) -> list[dict[str, str]]:
    """The last of each test."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list({line["test"]: line for line in lines}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("vllm", "llama.cpp"), required=True)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer", default="", help="folder with the model's tokenizer.json, for vLLM's tests")
    parser.add_argument("--adapter", default="", help="folder of a LoRA adapter of the model, for vLLM's tests")
    parser.add_argument("--report", action="store_true", help="run nothing; print what --output holds")
    parser.add_argument("--only", action="append", help="a word in the path of the files to run")
    parser.add_argument("--keyword", default="", help="pytest's -k; what the output says of other tests stays")
    parser.add_argument("--test-timeout-s", type=float, default=60.0)
    parser.add_argument("--max-model-len", type=int, default=2048, help="longest context that a test may ask for")
    parser.add_argument("--file-timeout-s", type=float, default=900.0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    settings = {
        "MODEL": arguments.model,
        "TOKENIZER": arguments.tokenizer,
        "ADAPTER": arguments.adapter,
        "KEYWORD": arguments.keyword,
        "CHECKOUT": str(checkout),
        "RESULTS": str(arguments.output.resolve()),
        "MAX_MODEL_LEN": str(arguments.max_model_len),
        "TIMEOUT_S": f"{arguments.test_timeout_s:g}",
    }
    os.environ |= {f"CONFORMANCE_{name}": value for name, value in settings.items()}
    paths = [str(Path(__file__).parent.resolve())]
    if arguments.suite == "vllm":
        names, paths = list(VLLM_FILES), [*paths, str(checkout)]
    else:
        names = sorted(path.name for path in (checkout / LLAMA_FOLDER / "unit").glob("test_*.py"))
    names = [name for name in names if not arguments.only or any(word in name for word in arguments.only)]
    names = [] if arguments.report else names
    kept = [
        line
        for line in read_results(arguments.output)
        if arguments.keyword or not any(name in line["test"] for name in names)
    ]
    arguments.output.write_text("".join(json.dumps(line) + "\n" for line in kept))
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(paths)}
    run = run_vllm if arguments.suite == "vllm" else run_llama
    if names:
        run(checkout, names, environment, arguments.file_timeout_s)
    print_table(arguments.suite, read_results(arguments.output))


def print_table(suite: str, results: list[dict[str, str]]) -> None:
    """By file, as docs/conformance-vllm-llama.md has it; then why, by verdict; then what is not explained."""
    columns = ("passed", REFUSED, NOT_APPLICABLE, "defect")
    verdicts = [(result, *verdict_of(suite, result)) for result in results]
    print(f"| file | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for file in sorted({result["test"].partition("::")[0] for result in results}):
        counts = Counter(verdict for result, verdict, _ in verdicts if result["test"].partition("::")[0] == file)
        print(f"| `{file}` | {' | '.join(str(counts[column]) for column in columns)} |")
    totals = Counter(verdict for _, verdict, _ in verdicts)
    print(f"| all | {' | '.join(str(totals[column]) for column in columns)} |\n")
    reasons = Counter((verdict, why) for _, verdict, why in verdicts if verdict in (REFUSED, NOT_APPLICABLE))
    for (verdict, why), number in sorted(reasons.items()):
        print(f"- {verdict}, {number}: {why}")
    for result, verdict, why in verdicts:
        if verdict == "defect":
            print(f"NOT EXPLAINED {result['test']}: {why}")


if __name__ == "__main__":
    main()
