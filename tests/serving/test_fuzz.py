"""Whatever arrives, the answer is typed and the server goes on: hypothesis here, schemathesis below.

More examples of the latter: PELTON_NUM_EXAMPLES=1000 pytest tests/serving/test_fuzz.py -k schema; of one operation:
PELTON_OPERATION="POST /v1/responses".
"""

from __future__ import annotations

import json
import os
from typing import Any

import httpx2
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from pelton.core.sampling_params import MAX_N
from pelton.serving.openai.requests import ChatRequest, CompletionRequest
from pelton.serving.openapi import build_openapi
from pelton.serving.routes import ROUTES
from tests.serving.make import RunningServer

NUM_EXAMPLES = int(os.environ.get("PELTON_NUM_EXAMPLES", "10"))
OPERATION = os.environ.get("PELTON_OPERATION")
PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/responses/compact",
    "/v1/messages",
    "/tokenize",
    "/detokenize",
    "/v1/embeddings",
    "/v1/score",
    "/v1/rerank",
]
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from([2**64, -1, 1e300])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
names = st.sampled_from(
    sorted({*ChatRequest.__struct_encode_fields__, *CompletionRequest.__struct_encode_fields__} - {"max_tokens"})
) | st.text(max_size=10)


def check(response: httpx2.Response) -> None:
    assert response.status_code in (200, 400, 404, 408, 413, 415, 429), response.text
    if response.status_code != 200:
        is_anthropic = response.request.url.path.startswith("/v1/messages")
        names = {"message", "type"} if is_anthropic else {"message", "type", "param", "code"}
        assert set(response.json()["error"]) == names


@quick
@given(path=st.sampled_from(PATHS), content=st.binary(max_size=200))
def test_any_bytes(http: httpx2.Client, path: str, content: bytes) -> None:
    check(http.post(path, content=content, headers={"content-type": "application/json"}))


@quick
@given(path=st.sampled_from(PATHS), fields=st.dictionaries(names, values, max_size=4))
def test_any_fields(http: httpx2.Client, path: str, fields: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "a"}]
    prompt: dict[str, Any] = {"messages": messages} if "chat" in path or "messages" in path else {"prompt": "a"}
    if "responses" in path:
        prompt = {"input": messages}
    # Python writes NaN, Infinity and lone surrogates: the server has to refuse them.
    content = json.dumps(prompt | {"max_tokens": 2} | fields)
    response = http.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404, 408, 429), response.text
    check(response)


@quick
@given(path=st.sampled_from(PATHS), cut=st.integers(0, 60), extra=st.binary(max_size=5))
def test_damaged_json(http: httpx2.Client, path: str, cut: int, extra: bytes) -> None:
    body = b'{"prompt": "abc", "max_tokens": 1, "stop": ["\\u00e9", "x"]}'
    check(http.post(path, content=body[:cut] + extra, headers={"content-type": "application/json"}))


@quick
@given(
    messages=st.lists(
        st.fixed_dictionaries({}, optional={"role": values, "content": values, "tool_calls": values, "name": values}),
        max_size=3,
    )
)
def test_any_messages(http: httpx2.Client, messages: list[Any]) -> None:
    content = json.dumps({"messages": messages, "max_tokens": 1})
    check(http.post(PATHS[0], content=content, headers={"content-type": "application/json"}))


@quick
@given(text=st.text(max_size=50), stop=st.lists(st.text(min_size=1, max_size=5), max_size=4))
def test_any_text_and_stop(http: httpx2.Client, text: str, stop: list[str]) -> None:
    body = {"messages": [{"role": "user", "content": text}], "stop": stop, "max_tokens": 70}
    try:
        content = json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        content = json.dumps(body).encode()
    response = http.post(PATHS[0], content=content, headers={"content-type": "application/json"})
    check(response)
    if response.status_code == 200:
        answer = response.json()["choices"][0]["message"]["content"]
        assert not any(word in answer for word in stop)


@quick
@given(
    name=st.sampled_from(
        ["x-request-id", "x-tenant-id", "x-session-id", "x-program-id", "authorization", "content-type"]
    ),
    # Control characters are refused by the HTTP parser, before there is a request to answer.
    value=st.binary(max_size=40).filter(lambda data: all(byte >= 32 and byte != 127 for byte in data)),
)
def test_any_headers(http: httpx2.Client, name: str, value: bytes) -> None:
    headers = {"content-type": b"application/json", name: value.strip()}
    check(http.post("/v1/completions", content=b'{"prompt": "a", "max_tokens": 1}', headers=headers))


schema = schemathesis.openapi.from_dict(build_openapi(ROUTES, "test", has_key=False))
if OPERATION:
    schema = schema.include(method=OPERATION.split()[0], path=OPERATION.split()[1])


@schema.parametrize()
@settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_schema(case: schemathesis.Case, server: RunningServer) -> None:
    """The OpenAPI document tells the truth: statuses, content types, shapes; nothing fails or hangs."""
    if isinstance(case.body, dict) and case.method == "POST":
        _shorten(case.body)
    response = case.call(base_url=server.url, timeout=30)
    case.validate_response(
        response,
        checks=[
            not_a_server_error,
            status_code_conformance,
            content_type_conformance,
            response_headers_conformance,
            response_schema_conformance,
            negative_data_rejection,
            unsupported_method,
        ],
    )


def _shorten(body: dict[str, Any]) -> None:
    """Keep what is valid small: 128 sequences of 2,000 tokens take long."""
    for name, limit, most in (
        ("max_tokens", 16, 2000),
        ("max_completion_tokens", 16, 2000),
        ("max_output_tokens", 16, 2000),
        ("n", 4, MAX_N),
        ("best_of", 4, MAX_N),
    ):
        value = body.get(name)
        if isinstance(value, int) and limit < value <= most:
            body[name] = limit


def test_the_document_lists_every_error() -> None:
    document = build_openapi(ROUTES, "test", has_key=True)
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]) == {"200", "400", "401", "403", "404", "408", "413", "415", "429", "500", "503"}
    assert chat["security"] == [{"ApiKey": []}]
    assert "security" not in document["paths"]["/live"]["get"]
    schemas = document["components"]["schemas"]
    assert schemas["ChatRequest"]["properties"]["functions"]["enum"] == [None, []]
    assert len(schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]) == 3
