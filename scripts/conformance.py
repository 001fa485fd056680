"""Test suites of others, run as black boxes against a Pelton server.

    python scripts/conformance.py --suite openai-python --checkout DIR --model MODEL [--output report.jsonl]

`DIR` is a checkout of the suite's own repository; nothing of it is kept here. Starts `pelton serve` with the model
names that the suite uses, runs the files that concern an inference server, and prints how many of each file passed,
passed when adapted (conformance_placeholders.py says how), met a resource that the server does not have, and failed.
`--output` gets a line of JSON for every test. docs/conformance.md says what the tests are and why some do not apply.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 120.0
TEST_TIMEOUT_S = 30.0
OUTCOMES = ("passed", "adapted", "no request", "absent", "does not apply", "failed", "skipped")

Result = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """`run` yields a result for every test: file, name, outcome (of `OUTCOMES`) and reason."""

    run: Callable[[Arguments, str], Iterator[Result]]
    served_names: tuple[str, ...]
    # Most tests name no max_tokens, and how much is said is not what they ask.
    max_model_len: int


@dataclass(frozen=True)
class Arguments:
    checkout: Path
    only: str | None
    keyword: str
    timeout_s: float
    adapter: str


OPENAI_PYTHON_FILES = tuple(
    f"tests/api_resources/{name}.py"
    for name in (
        "chat/test_completions",
        "chat/completions/test_messages",
        "test_completions",
        "test_responses",
        "responses/test_input_items",
        "responses/test_input_tokens",
        "test_embeddings",
        "test_models",
        "test_files",
        "test_batches",
    )
)


# What the cause of a failure holds that is no matter of the server's.
NOT_APPLICABLE = (
    (
        "output.0.ResponseOutputMessage.content.0.ResponseOutputText.annotations",
        "the client's type of a compacted conversation has no message of a user, though its text says so",
    ),
    ("embedding\n  Input should be a valid list", "the client asks for base64, then its strict mode wants a list"),
    (
        "data.0.role\n  Input should be 'assistant'",
        "the client's type of messages that were sent has no role but assistant",
    ),
    ("token_logprobs.0\n  Input should be a valid number", "the first token of an echoed prompt has no probability"),
)


def openai_python(arguments: Arguments, url: str) -> Iterator[Result]:
    checkout = arguments.checkout
    search_path = os.pathsep.join([str(Path(__file__).parent), str(checkout / "src"), str(checkout)])
    environment = os.environ | {"TEST_API_BASE_URL": f"{url}/v1", "PYTHONPATH": search_path}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "exchanges.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-o", "addopts=", "-p", "no:cacheprovider"]
        command += ["-p", "conformance_placeholders", f"--server-url={url}", f"--exchange-log={log}"]
        command += [f"--test-timeout-s={TEST_TIMEOUT_S}", f"--adapter={arguments.adapter}"]
        command += ["-k", arguments.keyword]
        command += [file for file in OPENAI_PYTHON_FILES if arguments.only is None or arguments.only in file]
        try:
            subprocess.run(command, cwd=checkout, env=environment, check=False, timeout=arguments.timeout_s)
        except subprocess.TimeoutExpired:
            print(f"cut off after {arguments.timeout_s:g} s", file=sys.stderr)
        for line in log.read_text().splitlines():
            result = json.loads(line)
            result["outcome"], result["reason"] = judge(result)
            yield result


def judge(result: Result) -> tuple[str, str]:
    """Outcome and reason of a test that the plugin ran."""
    last = result["exchanges"][-1] if result["exchanges"] else None
    if result["outcome"] == "passed" and (result["taken_out"] or result["placed"]):
        refused = dict.fromkeys(f"{exchange['param']} ({exchange['code']})" for exchange in result["taken_out"])
        return "adapted", "; ".join(
            f"{what} {', '.join(names)}" for what, names in (("with", result["placed"]), ("without", refused)) if names
        )
    if result["outcome"] == "passed" and last is None:
        return "no request", ""
    if result["outcome"] != "failed":
        return result["outcome"], result["problem"]
    if last is not None and (last["status"] == 405 or (last["status"] == 404 and "there is no /" in last["message"])):
        return "absent", f"{last['method']} {last['path']}"
    for cause, reason in NOT_APPLICABLE:
        if cause in result["cause"]:
            return "does not apply", reason
    told = "" if last is None else f"{last['method']} {last['path']}: {last['status']} {last['message'] or ''}; "
    return "failed", f"{told}{result['problem'].splitlines()[0]} {result['cause']}"


def open_responses(arguments: Arguments, url: str) -> Iterator[Result]:
    command = ["node_modules/.bin/tsx", "bin/compliance-test.ts", "--json", "--api-key", "none", "--model", "model"]
    command += ["--base-url", f"{url}/v1"]
    if arguments.only:
        command += ["--filter", arguments.only]
    # Node had WebSocket behind this flag up to 21.
    environment = os.environ | {"NODE_OPTIONS": "--experimental-websocket"}
    done = subprocess.run(
        command,
        cwd=arguments.checkout,
        env=environment,
        check=False,
        timeout=arguments.timeout_s,
        stdout=subprocess.PIPE,
    )
    for test in json.loads(done.stdout)["results"]:
        reason = "; ".join(test.get("errors", ()))
        outcome = test["status"]
        if test["id"] == "response-output-phase-schema":
            outcome, reason = "no request", "checks an answer that it brings along"
        elif outcome == "failed" and test["id"].startswith("websocket"):
            outcome, reason = "absent", f"WebSocket: {reason}"
        elif outcome == "failed" and ("HTTP 404" in reason or "HTTP 405" in reason):
            outcome, reason = "absent", json.dumps(test.get("response"))
        elif outcome == "failed" and test["id"] == "image-input" and "HTTP 400" in reason:
            outcome, reason = "does not apply", json.dumps(test.get("response"))
        yield test | {"file": "bin/compliance-test.ts", "name": test["id"], "outcome": outcome, "reason": reason}


SUITES = {
    "openai-python": Suite(
        openai_python,
        served_names=(
            "gpt-5.4",
            "gpt-5.1",
            "gpt-5.6-sol",
            "gpt-4o-mini",
            "gpt-3.5-turbo-instruct",
            "text-embedding-3-small",
            "model",
        ),
        max_model_len=128,
    ),
    "open-responses": Suite(open_responses, served_names=("model",), max_model_len=4096),
}


@contextmanager
def running_server(model: str, suite: Suite) -> Iterator[str]:
    """A server's URL while the block runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("pelton")), "serve", model, "--port", str(port)]
    command += ["--max-model-len", str(suite.max_model_len), "--allow-runtime-lora-updating"]
    command += [argument for name in suite.served_names for argument in ("--served-model-name", name)]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as data:
        server = subprocess.Popen([*command, "--data-dir", data], stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(server, url)
            yield url
        finally:
            server.terminate()
            server.wait(60)


def wait_until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server did not start")


def show(results: list[Result]) -> None:
    for result in results:
        if result["outcome"] == "failed":
            print(f"failed {result['file']} {result['name']}: {result['reason'][:400]}")
    for outcome in ("adapted", "absent", "does not apply", "skipped"):
        reasons = Counter(result["reason"] for result in results if result["outcome"] == outcome)
        for reason, number in sorted(reasons.items()):
            print(f"{outcome}, {number}: {reason[:400]}")
    print("| file | " + " | ".join(OUTCOMES) + " |")
    for file in dict.fromkeys(result["file"] for result in results):
        counts = Counter(result["outcome"] for result in results if result["file"] == file)
        print(f"| {file} | " + " | ".join(str(counts[outcome]) for outcome in OUTCOMES) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=sorted(SUITES), required=True)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--url", help="of a server that runs already; it must know the names that the suite uses")
    parser.add_argument("--only", help="part of a file's name (openai-python), ids of tests (open-responses)")
    parser.add_argument("--keyword", default="", help="pytest's -k (openai-python)")
    parser.add_argument("--adapter", default="none", help="folder of a LoRA adapter of the model (openai-python)")
    parser.add_argument("--timeout-s", type=float, default=1800.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    suite = SUITES[options.suite]
    arguments = Arguments(options.checkout.resolve(), options.only, options.keyword, options.timeout_s, options.adapter)
    if options.url:
        results = list(suite.run(arguments, options.url))
    else:
        with running_server(options.model, suite) as url:
            results = list(suite.run(arguments, url))
    show(results)
    if options.output:
        options.output.write_text("".join(json.dumps(result) + "\n" for result in results))


if __name__ == "__main__":
    main()
