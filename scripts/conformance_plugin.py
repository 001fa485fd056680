"""The pytest plugin of conformance_vllm.py: stands in for what the suites of vLLM and llama.cpp import.

Settings come from the environment, since pytest is started as its own process: CONFORMANCE_MODEL, _TOKENIZER (a
folder with tokenizer.json), _CHECKOUT, _RESULTS (a file that gets one JSON object a line for every test), _TIMEOUT_S
and _MAX_MODEL_LEN. `tests.utils.RemoteOpenAIServer` starts `pelton serve` instead of `vllm serve`; every name of
`vllm` that a test would run in its own process skips the test, which is then about vLLM's parts, not about a server.
"""

from __future__ import annotations

import base64
import importlib.abc
import importlib.machinery
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ENVIRONMENT = {
    name: os.environ.get(f"CONFORMANCE_{name}", "")
    for name in ("MODEL", "TOKENIZER", "ADAPTER", "CHECKOUT", "RESULTS", "TIMEOUT_S", "MAX_MODEL_LEN")
}
START_TIMEOUT_S = 60.0

# Flags that are passed on; every other one concerns GPUs or vLLM's insides.
PASSED_FLAGS = (
    "--max-num-seqs",
    "--max-num-batched-tokens",
    "--served-model-name",
    "--tool-call-parser",
    "--reasoning-parser",
    "--api-key",
    "--enable-auto-tool-choice",
    "--enable-force-include-usage",
    "--root-path",
)
UNVERSIONED = ("/chat/completions", "/completions", "/embeddings", "/responses", "/models")
STUBBED = ("vllm", "tests.models", "tests.conftest", "tests.utils", "wget")


def serve_arguments(arguments: Sequence[str]) -> list[str]:
    """Those of `vllm serve` that Pelton knows; the context is cut, for the sake of time."""
    kept = {"--max-model-len": [ENVIRONMENT["MAX_MODEL_LEN"]]}
    rest = list(arguments)
    while rest:
        flag, _, value = rest.pop(0).partition("=")
        flag = flag.replace("_", "-")
        values = [value] if value else []
        while rest and not rest[0].startswith("-"):
            values.append(rest.pop(0))
        if flag == "--lora-modules":  # NAME=PATH, or JSON; those that are named cannot be had
            names = [json.loads(value)["name"] if value[0] == "{" else value.partition("=")[0] for value in values]
            kept[flag] = [f"{name}={ENVIRONMENT['ADAPTER']}" for name in names]
        elif flag == "--max-model-len":
            kept[flag] = [str(min(int(values[0]), int(ENVIRONMENT["MAX_MODEL_LEN"])))]
        elif flag in PASSED_FLAGS:
            kept[flag] = values
    names = kept.pop("--served-model-name", [])
    return [argument for flag, values in kept.items() for argument in (flag, *values)] + [
        argument for name in names for argument in ("--served-model-name", name)
    ]


class PeltonServer:
    """What vLLM's tests use of `RemoteOpenAIServer`: a server while the block runs, and clients for it."""

    DUMMY_API_KEY = "token-abc123"

    def __init__(
        self, model: str, vllm_serve_args: Sequence[str] = (), env_dict: dict[str, str] | None = None, **_: Any
    ) -> None:
        arguments = serve_arguments(vllm_serve_args)
        if env_dict and "VLLM_API_KEY" in env_dict:
            arguments += ["--api-key", env_dict["VLLM_API_KEY"]]
        if env_dict and "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in env_dict:
            arguments += ["--allow-runtime-lora-updating"]
        if "--served-model-name" not in vllm_serve_args:
            arguments = ["--served-model-name", model, *arguments]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.host = "127.0.0.1"
        self.show_hidden_metrics = False
        self.url_root = f"http://{self.host}:{self.port}"
        command = [str(Path(sys.executable).with_name("pelton")), "serve", ENVIRONMENT["MODEL"]]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, lives as long as the server
        self.proc = subprocess.Popen(
            [*command, "--port", str(self.port), *arguments], stdout=self._log, stderr=subprocess.STDOUT
        )
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s and self.proc.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url_root}/health", timeout=1):
                    return
            except OSError:
                time.sleep(0.1)
        self.proc.kill()
        self._log.seek(0)
        pytest.skip(f"this server cannot be started so: {self._log.read().decode()[-300:]}")

    def __enter__(self) -> PeltonServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.proc.terminate()
        try:
            self.proc.wait(20)
        except subprocess.TimeoutExpired:
            self.proc.kill()

    def url_for(self, *parts: str) -> str:
        return "/".join((self.url_root, *(part.strip("/") for part in parts)))

    def get_client(self, **options: Any) -> Any:
        import openai

        return openai.OpenAI(**self._client_options("/v1", options))

    def get_async_client(self, **options: Any) -> Any:
        import openai

        return openai.AsyncOpenAI(**self._client_options("/v1", options))

    def get_client_anthropic(self, **options: Any) -> Any:
        import anthropic

        return anthropic.Anthropic(**self._client_options("", options))

    def get_async_client_anthropic(self, **options: Any) -> Any:
        import anthropic

        return anthropic.AsyncAnthropic(**self._client_options("", options))

    def _client_options(self, path: str, options: dict[str, Any]) -> dict[str, Any]:
        return {
            "base_url": self.url_root + path,
            "api_key": self.DUMMY_API_KEY,
            "max_retries": 0,
            "timeout": 600,
        } | options


class Absent(type):
    """A name of vLLM: may be named, subclassed and compared, but using it skips the test."""

    def __call__(cls, *_: Any, **__: Any) -> Any:
        pytest.skip(f"runs vLLM's own code in the test's process: {cls.__name__}")

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("is_rocm", "is_cuda", "is_cpu", "is_xpu", "is_cuda_alike", "is_fp8_fnuz", "supports_fp8"):
            return lambda *_: name == "is_cpu"
        if name == "device_count":
            return lambda: 0
        if name == "model_validate":
            return as_namespace
        return Absent(f"{cls.__name__}.{name}", (), {})


def as_namespace(value: Any) -> Any:
    if isinstance(value, dict):
        return SimpleNamespace(**{name: as_namespace(item) for name, item in value.items()})
    return [as_namespace(item) for item in value] if isinstance(value, list) else value


def get_tokenizer(*_: Any, **__: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(ENVIRONMENT["TOKENIZER"])


def unchanged(*arguments: Any, **_: Any) -> Any:
    """A decorator, with or without arguments, that does nothing."""
    return arguments[0] if arguments and callable(arguments[0]) else unchanged


PROVIDED = {
    "RemoteOpenAIServer": PeltonServer,
    "VLLM_PATH": Path(ENVIRONMENT["CHECKOUT"]),
    "ROCM_EXTRA_ARGS": [],
    "ROCM_ENV_OVERRIDES": {},
    "ROCM_DETERMINISM_ARGS": [],
    "get_tokenizer": get_tokenizer,
    "hf_api": lambda: SimpleNamespace(snapshot_download=lambda *_, **__: ENVIRONMENT["ADAPTER"]),
    "download_weights_from_hf": lambda name, *_, **__: name,
    "version": SimpleNamespace(_prev_minor_version=lambda: "0.0"),
    "multi_gpu_only": unchanged,
    "requires_fp8": unchanged,
    "large_gpu_mark": unchanged,
    "multi_gpu_test": unchanged,
    "create_new_process_for_each_test": unchanged,
}


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if not any(name == root or name.startswith(f"{root}.") for root in STUBBED):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)

        def attribute(name: str) -> Any:
            if name.startswith("__") and name != "__version__":
                raise AttributeError(name)
            if name in PROVIDED:
                return PROVIDED[name]
            base: tuple[type, ...] = (Exception,) if name.endswith(("Error", "Exception")) else ()
            return type(name, base, {}) if base else Absent(name, (), {})

        module.__getattr__ = attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.insert(0, StubFinder())
sys.modules.setdefault("pybase64", base64)


def pytest_sessionstart() -> None:
    """Two ways of llama.cpp's server that OpenAI's does not have, and that most of its tests take for granted.

    It answers without the version in the path, and a stream's first delta has the content null, not "".
    """
    process = getattr(sys.modules.get("utils"), "ServerProcess", None)
    if process is None:
        return
    make_url = process.make_url

    def with_version(self: Any, path: str, host: str | None = None) -> str:
        return str(make_url(self, f"/v1{path}" if path in UNVERSIONED else path, host))

    make_stream_request = process.make_stream_request

    def with_null_content(self: Any, *arguments: Any, **options: Any) -> Iterator[dict[str, Any]]:
        for chunk in make_stream_request(self, *arguments, **options):
            for choice in chunk.get("choices", ()):
                if choice.get("delta", {}).get("content") == "":
                    choice["delta"]["content"] = None
            yield chunk

    process.make_url = with_version
    process.make_stream_request = with_null_content


@pytest.fixture(scope="session")
def local_asset_server() -> None:
    """Serves pictures, to models that see."""


def pytest_collection_finish() -> None:
    if "transformers" in sys.modules:
        sys.modules["transformers"].AutoTokenizer.from_pretrained = get_tokenizer


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    def stop(*_: object) -> None:
        pytest.fail(f"took more than {ENVIRONMENT['TIMEOUT_S']} s", pytrace=False)

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, float(ENVIRONMENT["TIMEOUT_S"]))
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    record(report.nodeid, report.outcome if report.when == "call" or report.skipped else "error", reason_of(report))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.outcome != "passed":
        record(report.nodeid, "skipped" if report.skipped else "error", reason_of(report))


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr or "")
    place = f" (line {crash.lineno} of {Path(crash.path).name})" if crash else ""
    return " ".join(text.split())[:400] + place


def record(test: str, outcome: str, reason: str) -> None:
    with Path(ENVIRONMENT["RESULTS"]).open("a") as file:
        file.write(json.dumps({"test": test, "outcome": outcome, "reason": reason}) + "\n")
