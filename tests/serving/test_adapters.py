"""LoRA adapters at the HTTP border, over a scripted engine; `tests/system/test_lora.py` has the real one."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import httpx2
import openai
import pytest

from pelton.core.errors import ConfigError, ModelFileError, ModelNotFoundError, PeltonError
from pelton.core.lora import LoraAdapter
from pelton.engine.adapters import AdapterTable
from pelton.serving.config import ServerConfig
from tests.serving.make import MODEL_NAME, RunningServer, running_server

ADAPTER = LoraAdapter("0123", "/adapters/a", 8, 1000)
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PROBLEMS: dict[str, PeltonError] = {
    "/damaged": ModelFileError("/damaged", "cut short"),
    "/full": ConfigError("as many as max_loras allows"),
    "/nowhere": ModelNotFoundError("/nowhere: no folder"),
}


class Store:
    """Implements `core.protocols.AdapterStore`: files that are what their names say."""

    def load(self, path: str) -> Future[LoraAdapter]:
        future: Future[LoraAdapter] = Future()
        if path in PROBLEMS:
            future.set_exception(PROBLEMS[path])
        else:
            future.set_result(LoraAdapter(f"id of {path}", path, 8, 1000))
        return future

    def remove(self, lora_id: str) -> None: ...


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    config = ServerConfig(allow_runtime_lora_updating=True)
    with running_server(config=config, delay_s=0.02, start_engine=False, lora_modules=(("a", ADAPTER),)) as server:
        build = server.client._transport._build  # type: ignore[attr-defined]

        def build_with_adapters() -> object:
            engine = build()
            engine.adapters = AdapterTable(Store(), (ADAPTER,))
            return engine

        server.client._transport._build = build_with_adapters  # type: ignore[attr-defined]
        server.call(server.client.start())
        yield server


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=30) as client:
        yield client


def test_a_server_that_was_not_told_to_refuses() -> None:
    with running_server() as server, httpx2.Client(base_url=server.url) as http:
        for path in (LOAD, UNLOAD):
            answer = http.post(path, json={"lora_name": "a", "lora_path": "/a"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_enabled")
            assert "--allow-runtime-lora-updating" in answer.json()["error"]["message"]
        assert "vllm:lora_requests_info{" not in http.get("/metrics").text


def test_an_engine_without_adapters_says_so() -> None:
    config = ServerConfig(allow_runtime_lora_updating=True)
    with running_server(config=config) as server, httpx2.Client(base_url=server.url) as http:
        answer = http.post(LOAD, json={"lora_name": "a", "lora_path": "/a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_model")


def test_listing(http: httpx2.Client) -> None:
    models = {model["id"]: model for model in http.get("/v1/models").json()["data"]}
    assert list(models) == [MODEL_NAME, "alias", "a"]
    assert (models["a"]["parent"], models["a"]["root"]) == (MODEL_NAME, "/adapters/a")
    assert models[MODEL_NAME]["parent"] is None
    assert http.get("/v1/models/a").json() == models["a"]


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"lora_name": "new", "lora_path": "/damaged"}, 400, "invalid_model_file", "lora_path"),
        ({"lora_name": "new", "lora_path": "/full"}, 400, "invalid_config", "lora_path"),
        ({"lora_name": "new", "lora_path": "/nowhere"}, 404, "model_not_found", "model"),
        ({"lora_name": "new", "lora_path": "/a\0b"}, 400, "invalid_value", "lora_path"),
        ({"lora_name": "a", "lora_path": "/x"}, 400, "invalid_value", "lora_name"),
        ({"lora_name": "alias", "lora_path": "/x"}, 400, "invalid_value", "lora_name"),
        ({"lora_name": "", "lora_path": "/x"}, 400, "invalid_value", "lora_name"),
        ({"lora_path": "/x"}, 400, "missing_required_parameter", "lora_name"),
        ({"lora_name": "new", "lora_path": "/x", "base_model_name": "m"}, 400, None, "base_model_name"),
    ],
)
def test_loads_that_are_refused(
    http: httpx2.Client, body: dict[str, str], status: int, code: str | None, param: str
) -> None:
    answer = http.post(LOAD, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert code is None or error["code"] == code
    assert http.get("/v1/models/new").status_code == 404


def test_load_replace_unload(http: httpx2.Client, server: RunningServer) -> None:
    def lora_id() -> str:
        http.post("/v1/completions", json={"model": "b", "prompt": "x", "max_tokens": 1}).raise_for_status()
        context = server.executor.batches[-1].requests[0].context
        assert context is not None
        return context.lora_id

    assert http.post(LOAD, json={"lora_name": "b", "lora_path": "/1"}).text.startswith("Success")
    assert lora_id() == "id of /1"
    assert http.post(LOAD, json={"lora_name": "b", "lora_path": "/2", "load_inplace": True}).status_code == 200
    assert lora_id() == "id of /2"
    assert http.post(UNLOAD, json={"lora_name": "b"}).status_code == 200
    answer = http.post("/v1/completions", json={"model": "b", "prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert http.post(UNLOAD, json={"lora_name": "b"}).status_code == 404


@pytest.mark.parametrize(
    ("name", "status", "code"), [("nobody", 404, "model_not_found"), (MODEL_NAME, 403, "not_allowed")]
)
def test_what_is_not_deleted(http: httpx2.Client, name: str, status: int, code: str) -> None:
    answer = http.delete(f"/v1/models/{name}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert http.get(f"/v1/models/{MODEL_NAME}").status_code == 200


def test_an_adapter_is_deleted_as_a_model(http: httpx2.Client, server: RunningServer) -> None:
    assert http.post(LOAD, json={"lora_name": "org/c", "lora_path": "/3"}).status_code == 200
    deleted = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none").models.delete("org/c")
    assert (deleted.id, deleted.object, deleted.deleted) == ("org/c", "model", True)
    assert http.get("/v1/models/org/c").status_code == 404


def test_the_metric_names_what_runs(http: httpx2.Client) -> None:
    def adapters() -> tuple[str, str]:
        (line,) = re.findall(r"^vllm:lora_requests_info\{(.*)\} [0-9.e+]+$", http.get("/metrics").text, re.MULTILINE)
        values = dict(re.findall(r'(\w+)="([^"]*)"', line))
        return values["running_lora_adapters"], values["waiting_lora_adapters"]

    assert adapters() == ("", "")
    body = {"model": "a", "prompt": "x", "max_tokens": 200, "ignore_eos": True, "n": 2, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data")
        plain = threading.Thread(target=http.post, args=("/v1/completions",), kwargs={"json": {"prompt": "x"}})
        plain.start()
        assert adapters() == ("a", "")
    plain.join()
    for _ in range(200):
        if adapters() == ("", ""):
            return
        http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
    raise AssertionError("the metric still names an adapter whose requests have ended")
