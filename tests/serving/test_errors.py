"""Every refusal by status, code and parameter, in the one shape."""

from __future__ import annotations

import socket
from typing import Any

import httpx2
import openai
import pytest

from pelton.serving.config import ServerConfig
from tests.serving.make import MODEL_NAME, RunningServer, running_server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER: Any = [{"role": "user", "content": "hi"}]
TOOL: Any = {"type": "function", "function": {"name": "f"}}


def check_error(response: httpx2.Response, status: int, code: str | None, param: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert (body["error"]["code"], body["error"]["param"]) == (code, param)
    assert body["error"]["message"]
    return dict(body["error"])


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"temperature": -1}, "invalid_value", "temperature"),
        ({"temperature": "hot"}, "invalid_type", "temperature"),
        ({"temperature": True}, "invalid_type", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"top_p": 1.1}, "invalid_value", "top_p"),
        ({"top_k": -2}, "invalid_value", "top_k"),
        ({"top_k": 1.5}, "invalid_type", "top_k"),
        ({"min_p": 2}, "invalid_value", "min_p"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": 129}, "invalid_value", "n"),
        ({"n": 10**30}, "invalid_value", "n"),
        ({"seed": 2**64}, "invalid_value", "seed"),
        ({"seed": 1.0}, "invalid_type", "seed"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"stop": [""]}, "invalid_value", "stop[0]"),
        ({"stop": ["x"] * 65}, "invalid_value", "stop"),
        ({"stop": 1}, "invalid_type", "stop"),
        ({"stop_token_ids": [300]}, "invalid_value", "stop_token_ids"),
        ({"stop_token_ids": [1] * 1025}, "invalid_value", "stop_token_ids"),
        ({"metadata": dict.fromkeys(map(str, range(17)), "")}, "invalid_value", "metadata"),
        ({"stop_token_ids": [-1]}, "invalid_value", "stop_token_ids[0]"),
        ({"allowed_token_ids": []}, "invalid_value", "allowed_token_ids"),
        ({"allowed_token_ids": [10**6]}, "invalid_value", "allowed_token_ids"),
        ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias[...]"),
        ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"999": 1}}, "invalid_value", "logit_bias"),
        ({"presence_penalty": 3}, "invalid_value", "presence_penalty"),
        ({"frequency_penalty": -3}, "invalid_value", "frequency_penalty"),
        ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
        ({"min_tokens": 9, "max_tokens": 8}, "invalid_value", "min_tokens"),
        ({"max_tokens": True}, "invalid_type", "max_tokens"),
        ({"prompt_logprobs": 21}, "invalid_value", "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "unsupported_parameter", "prompt_logprobs"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"stream": "yes"}, "invalid_type", "stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "unknown_parameter", "stream_options.x"),
        ({"timeout_s": 0}, "invalid_value", "timeout_s"),
        ({"cache_salt": ""}, "invalid_value", "cache_salt"),
        ({"guided_whitespace_pattern": " "}, "unsupported_parameter", "guided_whitespace_pattern"),
        ({"use_beam_search": True}, "unsupported_parameter", "use_beam_search"),
        ({"length_penalty": 0.5}, "unsupported_parameter", "length_penalty"),
        ({"temprature": 1}, "unknown_parameter", "temprature"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_common_parameters(http: httpx2.Client, path: str, fields: Any, code: str, param: str | None) -> None:
    prompt = {"messages": USER} if path == CHAT else {"prompt": "a"}
    check_error(http.post(path, json=prompt | fields), 400, code, param)


def test_wrong_keys_of_logit_bias_are_named(http: httpx2.Client) -> None:
    bias = {"1": 1, "bad one": 5, "-2": 5} | {f"x{number}": 0 for number in range(20)}
    response = http.post(CHAT, json={"messages": USER, "logit_bias": bias})
    check_error(response, 400, "invalid_value", "logit_bias")
    message = response.json()["error"]["message"]
    assert "'bad one', '-2'" in message
    assert "17 more" in message
    assert "'1'" not in message


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_required_parameter", "messages"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "hi"}, "invalid_type", "messages"),
        ({"messages": [{"role": "user"}]}, "invalid_value", "messages[0]"),
        ({"messages": [{"content": "x"}]}, "missing_required_parameter", "messages[0].role"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "foo": 1}]}, "unknown_parameter", "messages[0].foo"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
            "unsupported_content_type",
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "missing_required_parameter",
            "messages[0].content[0].text",
        ),
        ({"messages": [{"role": "user", "content": "x", "audio": {}}]}, "unsupported_parameter", "messages[0].audio"),
        (
            {"messages": [*USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "invalid_value",
            "messages[1].tool_calls[0].function.arguments",
        ),
        ({"messages": USER, "max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"messages": USER, "max_tokens": 1, "max_completion_tokens": 2}, "invalid_value", "max_tokens"),
        ({"messages": USER, "top_logprobs": 1}, "invalid_value", "top_logprobs"),
        ({"messages": USER, "logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"messages": USER, "logprobs": 1}, "invalid_type", "logprobs"),
        ({"messages": USER, "functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
        ({"messages": USER, "function_call": "auto"}, "unsupported_parameter", "function_call"),
        ({"messages": USER, "modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
        ({"messages": USER, "chat_template": "{{ 1 }}"}, "unsupported_parameter", "chat_template"),
        ({"messages": USER, "reasoning_effort": "high"}, "unsupported_parameter", "reasoning_effort"),
        ({"messages": USER, "thinking_budget": 9}, "unsupported_parameter", "thinking_budget"),
        ({"messages": USER, "thinking_budget": 9, "max_thinking_tokens": 8}, "invalid_value", "thinking_budget"),
        ({"messages": USER, "tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].function"),
        (
            {"messages": USER, "tools": [{"type": "custom", "function": {"name": "f"}}]},
            "invalid_value",
            "tools[0].type",
        ),
        ({"messages": USER, "tools": [{"function": {"name": "a b"}}]}, "invalid_value", "tools[0].function.name"),
        ({"messages": USER, "tools": [TOOL, TOOL]}, "invalid_value", "tools[1].function.name"),
        (
            {"messages": USER, "tools": [{"function": {"name": "f", "parameters": {"type": "array"}}}]},
            "invalid_value",
            "tools[0].function.parameters.type",
        ),
        (
            {"messages": USER, "tools": [{"function": {"name": "f", "parameters": {"properties": {"x": 1}}}}]},
            "invalid_value",
            "tools[0].function.parameters.properties.x",
        ),
        (
            {"messages": USER, "tools": [{"function": {"name": "f", "parameters": {"required": "x"}}}]},
            "invalid_value",
            "tools[0].function.parameters.required",
        ),
        ({"messages": USER, "tool_choice": "auto"}, "invalid_value", "tool_choice"),
        ({"messages": USER, "tools": [TOOL], "tool_choice": "any"}, "invalid_value", "tool_choice"),
        ({"messages": USER, "tools": [TOOL], "tool_choice": {"type": "function"}}, "invalid_value", "tool_choice"),
        (
            {"messages": USER, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "invalid_value",
            "tool_choice.function.name",
        ),
        ({"messages": USER, "prompt": "a"}, "unknown_parameter", "prompt"),
        (
            {"messages": USER, "continue_final_message": True, "add_generation_prompt": True},
            "invalid_value",
            "continue_final_message",
        ),
        ({"messages": USER, "max_tokens": 3000}, "context_length_exceeded", "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, "context_length_exceeded", "prompt"),
        ({"messages": [{"role": "user", "content": "x" * 900_000}]}, "context_length_exceeded", "messages"),
    ],
)
def test_chat(http: httpx2.Client, body: Any, code: str, param: str | None) -> None:
    check_error(http.post(CHAT, json=body), 400, code, param)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_required_parameter", "prompt"),
        ({"prompt": None}, "invalid_type", "prompt"),
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": [[]]}, "invalid_value", "prompt"),
        ({"prompt": ["a", 1]}, "invalid_value", "prompt"),
        ({"prompt": [True]}, "invalid_type", "prompt[0]"),
        ({"prompt": [1.5]}, "invalid_type", "prompt[0]"),
        ({"prompt": [300]}, "invalid_value", "prompt"),
        ({"prompt": ["a"] * 257}, "invalid_value", "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"prompt": "a", "logprobs": True}, "invalid_type", "logprobs"),
        ({"prompt": "a", "suffix": "b"}, "unsupported_parameter", "suffix"),
        ({"prompt": "a", "store": True}, "unsupported_parameter", "store"),
        ({"prompt": "a", "tools": []}, "unknown_parameter", "tools"),
        ({"prompt": "x" * 2048}, "context_length_exceeded", "prompt"),
        ({"prompt": [97] * 2048}, "context_length_exceeded", "prompt"),
    ],
)
def test_completions(http: httpx2.Client, body: Any, code: str, param: str | None) -> None:
    check_error(http.post(COMPLETIONS, json=body), 400, code, param)


def test_context_length_error_has_the_numbers(http: httpx2.Client) -> None:
    error = check_error(http.post(COMPLETIONS, json={"prompt": "x" * 2048}), 400, "context_length_exceeded", "prompt")
    assert "2048" in error["message"]


def test_unknown_parameter_names_the_nearest(http: httpx2.Client) -> None:
    error = check_error(
        http.post(CHAT, json={"messages": USER, "max_completion_token": 1}),
        400,
        "unknown_parameter",
        "max_completion_token",
    )
    assert "'max_completion_tokens'" in error["message"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"prompt": "a"} x', "invalid_json"),
        (b'{"prompt": "a", "n": NaN}', "invalid_json"),
        (b'{"prompt": "\xff"}', "invalid_json"),
        (b'{"prompt": "\\ud800"}', "invalid_json"),
        (b"[]", "invalid_type"),
        (b"null", "invalid_type"),
        (b'"text"', "invalid_type"),
        (b'{"vllm_xargs":' + b"[" * 200_000, "invalid_json"),
        (b'{"prompt": "a", "kv_transfer_params":' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}", "invalid_json"),
    ],
)
def test_bodies_that_are_not_json(http: httpx2.Client, content: bytes, code: str) -> None:
    response = http.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
    check_error(response, 400, code)


def test_numbers_out_of_range(http: httpx2.Client) -> None:
    headers = {"content-type": "application/json"}
    response = http.post(COMPLETIONS, content=b'{"prompt": "a", "temperature": 1e999}', headers=headers)
    check_error(response, 400, "invalid_value", "temperature")
    # These read a body twice where something is wrong with it.
    response = http.post("/v1/responses", content=b'{"input": "a", "temperature": 1e999}', headers=headers)
    check_error(response, 400, "invalid_value", "temperature")
    response = http.post("/v1/messages", content=b'{"messages": [], "max_tokens": 1e999}', headers=headers)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
    item = b'{"input": [{"role": "user", "content": "a", "extra": 1e999}]}'
    assert http.post("/v1/responses", content=item, headers=headers).status_code == 400


def test_routes_methods_and_content_types(http: httpx2.Client) -> None:
    check_error(http.get("/v2/nothing"), 404, "not_found")
    error = check_error(http.post("/chat/completions", json={}), 404, "not_found")
    assert "/v1/chat/completions" in error["message"]
    check_error(http.get("/v1/models/"), 404, "model_not_found", "model")
    response = http.get(COMPLETIONS)
    check_error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    check_error(http.post(CHAT, content=b"a=b", headers={"content-type": "text/plain"}), 415, "unsupported_media_type")
    body = b'{"prompt": "a", "max_tokens": 1}'
    assert http.post(COMPLETIONS, content=body).status_code == 200
    headers = {"content-type": "application/json; charset=utf-8"}
    assert http.post(COMPLETIONS, content=body, headers=headers).status_code == 200


def test_models(http: httpx2.Client) -> None:
    check_error(http.get("/v1/models/nothing"), 404, "model_not_found", "model")
    check_error(http.post(CHAT, json={"messages": USER, "model": "gpt-9"}), 404, "model_not_found", "model")
    for name in (MODEL_NAME, "alias"):
        assert http.get(f"/v1/models/{name}").json()["max_model_len"] == 2048
        answer = http.post(COMPLETIONS, json={"prompt": "a", "model": name, "max_tokens": 1}).json()
        assert answer["model"] == name
    assert [card["id"] for card in http.get("/v1/models").json()["data"]] == [MODEL_NAME, "alias"]


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"X-Tenant-Id": "no spaces"}, "X-Tenant-Id"),
        ({"X-Tenant-Id": "x" * 129}, "X-Tenant-Id"),
        ({"X-Tenant-Id": ""}, "X-Tenant-Id"),
        ({"X-Tenant-Id": "../other"}, "X-Tenant-Id"),
        ({"X-Tenant-Id": "a\u00e9".encode()}, "X-Tenant-Id"),
        ([("X-Tenant-Id", "a"), ("X-Tenant-Id", "b")], "X-Tenant-Id"),
        ({"X-Session-Id": "a b"}, "X-Session-Id"),
        ({"X-Session-Id": ""}, "X-Session-Id"),
        ({"X-Session-Id": "x" * 513}, "X-Session-Id"),
        ([("X-Session-Id", "a"), ("X-Session-Id", "b")], "X-Session-Id"),
        ({"X-Program-Id": "x" * 513}, "X-Program-Id"),
        ([("X-Program-Id", "a"), ("X-Program-Id", "a")], "X-Program-Id"),
    ],
)
def test_headers(http: httpx2.Client, headers: Any, param: str) -> None:
    response = http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}, headers=headers)
    check_error(response, 400, "invalid_value", param)
    if param == "X-Tenant-Id":
        for method, path in (("GET", "/v1/sessions"), ("DELETE", "/v1/sessions/a"), ("GET", "/v1/requests/a/timeline")):
            check_error(http.request(method, path, headers=headers), 400, "invalid_value", param)


def test_the_openai_client_raises_its_own_errors(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        openai_client.chat.completions.create(model="gpt-9", messages=USER)
    assert (not_found.value.code, not_found.value.type) == ("model_not_found", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as too_long:
        openai_client.chat.completions.create(model=MODEL_NAME, messages=[{"role": "user", "content": "x" * 4000}])
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as bad:
        openai_client.chat.completions.create(model=MODEL_NAME, messages=USER, n=1000, stream=True)
    assert bad.value.param == "n"


def test_api_key() -> None:
    with running_server(config=ServerConfig(api_key="secret-é")) as server, httpx2.Client(base_url=server.url) as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            response = http.post(CHAT, json={"messages": USER}, headers=headers)
            check_error(response, 401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
            check_error(http.get("/metrics", headers=headers), 401, "invalid_api_key")
            check_error(http.get("/nothing", headers=headers), 401, "invalid_api_key")
            assert [http.get(path, headers=headers).status_code for path in ("/live", "/ready", "/health")] == [200] * 3
        right = {"Authorization": b"Bearer " + "secret-é".encode()}
        assert http.get("/v1/models", headers=right).status_code == 200


def test_large_bodies() -> None:
    with running_server(config=ServerConfig(max_body_bytes=1000)) as server:
        with httpx2.Client(base_url=server.url) as http:
            body = b'{"prompt": "' + b"x" * 1500 + b'"}'
            headers = {"content-type": "application/json"}
            check_error(http.post(COMPLETIONS, content=body, headers=headers), 413, "request_too_large")
            chunked = http.post(COMPLETIONS, content=(body[i : i + 100] for i in range(0, 1500, 100)), headers=headers)
            check_error(chunked, 413, "request_too_large")
            assert http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}).status_code == 200
        # An upload without an end is cut off.
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            received = b""
            try:
                for _ in range(10_000):
                    connection.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
                received = connection.recv(4096)
            except (BrokenPipeError, ConnectionResetError):
                received = b"413"
            assert b"413" in received


def test_engine_not_ready() -> None:
    with running_server(start_engine=False) as server, httpx2.Client(base_url=server.url) as http:
        assert http.get("/live").status_code == 200
        for response in (
            http.get("/ready"),
            http.get("/health"),
            http.post(CHAT, json={"messages": USER}),
            http.post(COMPLETIONS, json={"prompt": "a", "stream": True}),
        ):
            check_error(response, 503, "service_unavailable")
            assert int(response.headers["retry-after"]) >= 1
        # What needs no engine is answered.
        assert http.get("/v1/models").status_code == 200
        assert http.post("/tokenize", json={"prompt": "ab"}).json()["count"] == 2
        server.call(server.client.start())
        assert http.get("/ready").status_code == 200
        assert http.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200


def test_full_queue() -> None:
    with (
        running_server(delay_s=0.02, max_num_seqs=1, max_num_waiting=2) as server,
        httpx2.Client(base_url=server.url, timeout=30) as http,
    ):
        body = {"prompt": ["a", "b", "c"], "max_tokens": 50, "ignore_eos": True, "stream": True}
        with http.stream("POST", COMPLETIONS, json=body) as running:
            assert running.status_code == 200
            refused = http.post(COMPLETIONS, json={"prompt": "a"})
            check_error(refused, 503, "queue_full")
            assert int(refused.headers["retry-after"]) >= 1
        metrics = http.get("/metrics").text
        assert 'pelton:admission_rejections_total{engine="0",model_name="scripted",reason="queue_full"} 1.0' in metrics


def test_prompts_of_one_request_are_admitted_together() -> None:
    with running_server(max_num_seqs=1, max_num_waiting=2) as server, httpx2.Client(base_url=server.url) as http:
        check_error(http.post(COMPLETIONS, json={"prompt": ["a", "b", "c", "d"]}), 503, "queue_full")
        assert server.client.num_requests == 0
        assert http.post(COMPLETIONS, json={"prompt": ["a", "b", "c"]}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_deadline(slow_server: RunningServer, stream: bool) -> None:
    body = {"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "timeout_s": 0.001, "stream": stream}
    with httpx2.Client(base_url=slow_server.url, timeout=30) as http:
        response = http.post(COMPLETIONS, json=body)
        check_error(response, 408, "deadline_exceeded")
        assert response.headers["x-should-retry"] == "false"


def test_failed_step(server: RunningServer, http: httpx2.Client) -> None:
    for stream in (False, True):
        server.executor.fail_next = RuntimeError("broken kernel")
        check_error(http.post(COMPLETIONS, json={"prompt": "a", "stream": stream}), 500, "engine_step_failed")
        assert http.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200


def test_request_id_is_echoed_or_made(http: httpx2.Client) -> None:
    assert http.get("/live", headers={"x-request-id": "my-id"}).headers["x-request-id"] == "my-id"
    made = {http.get("/live", headers={"x-request-id": value}).headers["x-request-id"] for value in ("", "x" * 129)}
    assert len(made) == 2
    assert all(len(value) == 32 for value in made)
    assert http.get("/live").headers["openai-processing-ms"].isdecimal()


def test_cors() -> None:
    config = ServerConfig(cors_origins=("https://a.example",), api_key="k")
    with running_server(config=config) as server, httpx2.Client(base_url=server.url) as http:
        headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
        preflight = http.options(CHAT, headers=headers)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        other = http.options(CHAT, headers=headers | {"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
