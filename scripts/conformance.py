"""Test suites of others, run as black boxes against a Pelton server.

    python scripts/conformance.py --suite openai-python --checkout DIR --model MODEL [--output report.json]

`DIR` is a checkout of the suite's own repository; nothing of it is kept here. Starts `pelton serve` with the model
names that the suite uses, runs the files that concern an inference server, prints what passed and failed by file,
and one line for every failure. docs/conformance.md says why each of them fails.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Suite:
    """`files` below the checkout; the environment's `{url}` is the server's, without a path."""

    files: tuple[str, ...]
    served_names: tuple[str, ...]
    environment: dict[str, str]
    python_path: tuple[str, ...] = ()


SUITES = {
    "openai-python": Suite(
        files=tuple(
            f"tests/api_resources/{name}"
            for name in (
                "chat/test_completions.py",
                "test_completions.py",
                "test_responses.py",
                "test_embeddings.py",
                "test_models.py",
                "test_files.py",
                "test_batches.py",
            )
        ),
        served_names=("gpt-5.4", "gpt-5.1", "gpt-5.6-sol", "gpt-3.5-turbo-instruct", "text-embedding-3-small", "model"),
        environment={"TEST_API_BASE_URL": "{url}/v1"},
        python_path=("src", "."),
    ),
}


@contextmanager
def running_server(model: str, names: tuple[str, ...]) -> Iterator[str]:
    """A server's URL while the block runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A short context: most of the suites name no max_tokens, and how much is said is not what they ask.
    command = [
        str(Path(sys.executable).with_name("pelton")),
        "serve",
        model,
        "--port",
        str(port),
        "--max-model-len",
        "256",
    ]
    command += [argument for name in names for argument in ("--served-model-name", name)]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(server, url)
            yield url
        finally:
            server.terminate()
            server.wait(30)


def wait_until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server did not start")


def run_suite(suite: Suite, checkout: Path, url: str, report: Path, timeout_s: float) -> None:
    files = [name for name in suite.files if (checkout / name).exists()]
    environment = os.environ | {name: value.format(url=url) for name, value in suite.environment.items()}
    environment["PYTHONPATH"] = os.pathsep.join(str(checkout / name) for name in suite.python_path)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        f"--junitxml={report}",
        *files,
    ]
    try:
        subprocess.run(command, cwd=checkout, env=environment, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"the suite took more than {timeout_s:g} s") from None


def read_report(path: Path) -> list[dict[str, str]]:
    """Name, file, outcome and the first line of what went wrong, of every test."""
    results = []
    for case in ElementTree.parse(path).iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        results.append(
            {
                "file": case.get("classname", "").rsplit(".Test", 1)[0],
                "name": case.get("name", ""),
                "outcome": "passed" if problem is None else problem.tag,
                "problem": "" if problem is None else problem.get("message", "").splitlines()[0][:300],
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=sorted(SUITES), required=True)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--url", help="of a server that runs already; it must know the names that the suite uses")
    parser.add_argument("--timeout-s", type=float, default=1800.0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    suite = SUITES[arguments.suite]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.xml"
        if arguments.url:
            run_suite(suite, arguments.checkout.resolve(), arguments.url, path, arguments.timeout_s)
        else:
            with running_server(arguments.model, suite.served_names) as url:
                run_suite(suite, arguments.checkout.resolve(), url, path, arguments.timeout_s)
        results = read_report(path)
    for file in dict.fromkeys(result["file"] for result in results):
        counts = Counter(result["outcome"] for result in results if result["file"] == file)
        print(f"{file}: {', '.join(f'{number} {outcome}' for outcome, number in sorted(counts.items()))}")
    for result in results:
        if result["outcome"] in ("failure", "error"):
            print(f"{result['outcome']} {result['file']} {result['name']}: {result['problem']}")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
