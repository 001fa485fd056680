"""Models, version, probes, tokenization, metrics."""

from __future__ import annotations

import random
from importlib.metadata import version
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pelton.core.errors import ConfigError
from pelton.core.events import EngineStats, EventKind, RequestEvent
from pelton.engine.wire import EngineUpdate
from pelton.serving.config import ServerConfig
from pelton.serving.metrics import MAX_TENANTS, ServerMetrics
from tests.serving.make import ANSWER, MODEL_NAME, running_server

USER: Any = [{"role": "user", "content": "hi"}]
# Names and kinds that dashboards key on.
FAMILIES = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:num_requests_waiting_by_reason": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:cache_config_info": "gauge",
    "vllm:admission_rejections": "counter",
    "vllm:request_num_preemptions": "histogram",
    "vllm:request_params_n": "histogram",
    "vllm:request_params_max_tokens": "histogram",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:num_preemptions": "counter",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:request_success": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_inference_time_seconds": "histogram",
    "vllm:request_prefill_time_seconds": "histogram",
    "vllm:request_decode_time_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
    "vllm:iteration_tokens_total": "histogram",
    "pelton:recomputed_tokens": "counter",
    "pelton:step_schedule_seconds": "counter",
    "pelton:step_execute_seconds": "counter",
    "pelton:step_postprocess_seconds": "counter",
    "pelton:admission_rejections": "counter",
    "pelton:tenant_tokens": "counter",
    "pelton:http_responses": "counter",
}


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted((k, v) for k, v in sample.labels.items() if k not in ("model_name", "engine")))):
            sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }  # fmt: skip


def test_version_models_probes(http: httpx2.Client) -> None:
    assert http.get("/version").json() == {"version": version("pelton")}
    models = http.get("/v1/models").json()
    assert models["object"] == "list"
    assert models["data"][0] == {
        "id": "scripted", "object": "model", "created": 1, "owned_by": "pelton", "root": "scripted",
        "parent": None, "max_model_len": 2048,
    }  # fmt: skip
    assert http.get("/live").json() == {"status": "live"}
    assert http.get("/ready").json() == http.get("/health").json() == {"status": "ready"}
    assert http.get("/docs").status_code == 200


def test_a_proxy_that_leaves_its_path() -> None:
    with running_server(config=ServerConfig(root_path="/llm", api_key="k")) as server:
        for base in (server.url, f"{server.url}/llm"):
            with httpx2.Client(base_url=base) as http:
                assert http.get("/health").status_code == 200
                assert http.get("/v1/models").status_code == 401
                http.headers["authorization"] = "Bearer k"
                assert http.get("/v1/models").status_code == 200
                error = http.post("/v1/messages", json={}).json()
                assert error["type"] == "error"  # Anthropic's envelope
                assert http.get("/openapi.json").json()["servers"] == [{"url": "/llm"}]
                assert "/llm/openapi.json" in http.get("/docs").text
        assert httpx2.get(f"{server.url}/llmv1/models", headers={"authorization": "Bearer k"}).status_code == 404
    for wrong in ("llm", "/llm/", "/"):
        with pytest.raises(ConfigError, match="root_path"):
            ServerConfig(root_path=wrong)


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "a<|start|>"}, [97, 257]),
        ({"prompt": ""}, []),
        ({"prompt": "é"}, [195, 169]),
        ({"messages": USER, "add_generation_prompt": False}, [257, *b"user\nhi", 256]),
        ({"messages": USER}, [257, *b"user\nhi", 256, 257, *b"assistant\n"]),
    ],
)
def test_tokenize_and_back(http: httpx2.Client, body: Any, tokens: list[int]) -> None:
    answer = http.post("/tokenize", json=body | {"return_token_strs": True}).json()
    assert answer["tokens"] == tokens
    assert answer["count"] == len(tokens) == len(answer["token_strs"])
    assert answer["max_model_len"] == 2048
    assert http.post("/tokenize", json=body).json()["token_strs"] is None
    if "prompt" in body:
        assert http.post("/detokenize", json={"tokens": tokens}).json() == {
            "prompt": body["prompt"],
            "content": body["prompt"],
        }
        named = http.post("/detokenize", json={"tokens": tokens, "model": MODEL_NAME})
        assert named.json() == {"prompt": body["prompt"]}


def test_tokenize_as_llama_cpp_does(http: httpx2.Client) -> None:
    assert http.post("/tokenize", json={"content": "aé"}).json()["tokens"] == [97, 195, 169]
    pieces = http.post("/tokenize", json={"content": "aé", "with_pieces": True}).json()["tokens"]
    assert pieces == [{"id": 97, "piece": "a"}, {"id": 195, "piece": [195]}, {"id": 169, "piece": [169]}]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": USER}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "content": "a"}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special": True}, 400, "add_special"),
        ("/tokenize", {"content": "a", "add_special_tokens": True}, 400, "add_special_tokens"),
        ("/tokenize", {"content": "a", "parse_special": False}, 400, "parse_special"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, 400, "chat_template"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "a b " * 200_000}, 400, "prompt"),
        ("/detokenize", {"tokens": [300]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": "abc"}, 400, "tokens"),
        ("/detokenize", {}, 400, "tokens"),
    ],
)
def test_tokenize_refusals(http: httpx2.Client, path: str, body: Any, status: int, param: str) -> None:
    response = http.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_metrics_have_the_names_and_count_exactly() -> None:
    with running_server() as server, httpx2.Client(base_url=server.url, timeout=30) as http:
        num_answer_tokens = len(ANSWER.encode()) + 1
        prompt = "a prompt of some length"
        for tenant in ("default", "default", "acme"):
            http.post(
                "/v1/completions", json={"prompt": prompt, "n": 2, "max_tokens": 99}, headers={"x-tenant-id": tenant}
            )
        http.post("/v1/chat/completions", json={"messages": USER, "max_tokens": 5, "stream": True})
        http.post("/v1/chat/completions", json={"messages": USER, "n": 0})
        text = http.get("/metrics").text
    kinds = {family.name: family.type for family in text_string_to_metric_families(text)}
    assert {name: kinds.get(name) for name in FAMILIES} == FAMILIES
    value = samples(text)
    num_tokens = 6 * num_answer_tokens + 5
    assert value["vllm:generation_tokens_total", ()] == num_tokens
    assert value["vllm:request_success_total", (("finished_reason", "stop"),)] == 6
    assert value["vllm:request_success_total", (("finished_reason", "length"),)] == 1
    assert value["vllm:e2e_request_latency_seconds_count", ()] == 7
    assert value["vllm:time_to_first_token_seconds_count", ()] == 7
    assert value["vllm:request_generation_tokens_sum", ()] == num_tokens
    assert value["vllm:request_params_n_sum", ()] == 3 * 2 + 1
    assert value["vllm:request_params_n_count", ()] == value["vllm:request_params_max_tokens_count", ()] == 4
    assert value["vllm:request_params_max_tokens_sum", ()] == 3 * 99 + 5
    assert (value["vllm:request_num_preemptions_count", ()], value["vllm:request_num_preemptions_sum", ()]) == (7, 0)
    assert value["vllm:admission_rejections_total", (("reason", "max_num_queued_reqs"),)] == 0
    assert 'kv_cache_size_tokens="16384"' in text
    assert 'kv_cache_max_concurrency="8.0"' in text
    assert value["vllm:inter_token_latency_seconds_count", ()] == num_tokens - 7
    assert value["pelton:tenant_tokens_total", (("kind", "generation"), ("tenant", "acme"))] == 2 * num_answer_tokens
    assert value["pelton:tenant_tokens_total", (("kind", "prompt"), ("tenant", "acme"))] == 2 * len(prompt)
    # The second request of a tenant finds the full blocks of the first; the other tenant finds nothing.
    assert value["vllm:prefix_cache_hits_total", ()] == len(prompt) // 4 * 4
    assert value["pelton:admission_rejections_total", (("reason", "invalid_value"),)] == 1
    responses = (("path", "/v1/chat/completions"), ("status", "400"))
    assert value["pelton:http_responses_total", responses] == 1
    assert value["vllm:num_requests_running", ()] == value["vllm:kv_cache_usage_perc", ()] == 0


def test_tokens_of_steps_add_up_to_prompts_and_answers() -> None:
    """As vLLM counts them. The prompt's last chunk is one token."""
    with running_server(max_num_batched_tokens=64) as server, httpx2.Client(base_url=server.url, timeout=30) as http:
        http.post("/v1/completions", json={"prompt": "x" * 129, "max_tokens": 20})
        value = samples(http.get("/metrics").text)
    assert value["vllm:iteration_tokens_total_sum", ()] == 129 + 20
    assert value["vllm:iteration_tokens_total_count", ()] == value["pelton:steps_total", ()]


def test_who_waits_for_what() -> None:
    metrics = ServerMetrics("m")
    metrics.take_update(EngineUpdate((), (), EngineStats(num_waiting=5, num_deferred=2)))
    value = samples(metrics.expose().decode())
    assert value["vllm:num_requests_waiting", ()] == 5
    assert value["vllm:num_requests_waiting_by_reason", (("reason", "capacity"),)] == 3
    assert value["vllm:num_requests_waiting_by_reason", (("reason", "deferred"),)] == 2


def test_preemptions_of_a_sequence_and_a_full_queue() -> None:
    metrics = ServerMetrics("m")
    kinds = [EventKind.QUEUED, EventKind.SCHEDULED, *[EventKind.PREEMPTED, EventKind.SCHEDULED] * 3]
    events = [RequestEvent("a", kind, float(i), 3, "default") for i, kind in enumerate([*kinds, EventKind.FINISHED])]
    metrics.take_update(EngineUpdate((), tuple(events), EngineStats()))
    metrics.count_rejection("queue_full")
    metrics.count_rejection("invalid_value")
    value = samples(metrics.expose().decode())
    assert value["vllm:request_num_preemptions_sum", ()] == 3
    assert value["vllm:admission_rejections_total", (("reason", "max_num_queued_reqs"),)] == 1


def test_counters_survive_a_new_engine() -> None:
    metrics = ServerMetrics("m")
    queued = RequestEvent("lost", EventKind.QUEUED, 0.0, 3, "default")
    metrics.take_update(EngineUpdate((), (queued,), EngineStats(num_steps_total=10, num_output_tokens_total=100)))
    metrics.take_update(EngineUpdate((), (), EngineStats(num_steps_total=12, num_output_tokens_total=120)))
    metrics.take_update(EngineUpdate((), (), EngineStats(num_steps_total=1, num_output_tokens_total=5)))
    value = samples(metrics.expose().decode())
    assert value["vllm:generation_tokens_total", ()] == 125
    assert value["pelton:steps_total", ()] == 13
    assert value["vllm:request_success_total", (("finished_reason", "error"),)] == 1


def test_labels_are_bounded() -> None:
    metrics = ServerMetrics("m")
    for index in range(MAX_TENANTS + 50):
        events = (
            RequestEvent(str(index), EventKind.QUEUED, 0.0, 1, f"tenant-{index}"),
            RequestEvent(str(index), EventKind.SCHEDULED, 0.1),
            RequestEvent(str(index), EventKind.FINISHED, 0.2, 2, random.choice(["stop", "odd_error", "other_error"])),
        )
        metrics.take_update(EngineUpdate((), events, EngineStats(num_steps_total=index)))
    value = samples(metrics.expose().decode())
    tenants = {dict(labels)["tenant"] for name, labels in value if name == "pelton:tenant_tokens_total"}
    assert len(tenants) == MAX_TENANTS + 1
    assert value["pelton:tenant_tokens_total", (("kind", "generation"), ("tenant", "other"))] == 100
    reasons = {dict(labels)["finished_reason"] for name, labels in value if name == "vllm:request_success_total"}
    assert reasons <= {"stop", "error"}
