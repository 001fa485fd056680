"""/v1/embeddings, /v1/score and /v1/rerank through the official client and in the shapes of others."""

from __future__ import annotations

import math
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from pelton.serving.config import ServerConfig
from pelton.serving.pooling import MAX_SUBMITTED
from tests.serving.make import MODEL_NAME, RunningServer, running_server

USER: Any = [{"role": "user", "content": "aab"}]


def counts(text: str) -> np.ndarray:
    values = np.array([text.count("a"), text.count("b"), text.count("c"), len(text)], "f4")
    return values / np.linalg.norm(values)


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("aab", ["aab"]),
        (["a", "bc"], ["a", "bc"]),
        ([97, 98], ["ab"]),
        ([[97], [98, 99]], ["a", "bc"]),
        (["a", [98, 99]], ["a", "bc"]),
        (["abc"] * (2 * MAX_SUBMITTED + 3), ["abc"] * (2 * MAX_SUBMITTED + 3)),
    ],
)
@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_embeddings(openai_client: openai.OpenAI, given: Any, texts: list[str], encoding: Any) -> None:
    answer = openai_client.embeddings.create(model=MODEL_NAME, input=given, encoding_format=encoding)
    assert [item.index for item in answer.data] == list(range(len(texts)))
    for item, text in zip(answer.data, texts, strict=True):
        found = item.embedding
        if isinstance(found, str):
            import base64

            found = np.frombuffer(base64.b64decode(found), "<f4")
        np.testing.assert_allclose(found, counts(text), rtol=1e-6)
    num_tokens = sum(map(len, texts))
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (num_tokens, num_tokens)
    default = openai_client.embeddings.create(model=MODEL_NAME, input=given)  # base64 behind the client's back
    np.testing.assert_allclose(default.data[0].embedding, counts(texts[0]), rtol=1e-6)


def test_an_input_as_long_as_the_context(openai_client: openai.OpenAI) -> None:
    for given, extra in (("a" * 2048, {}), ("a" * 3000, {"truncate_prompt_tokens": -1})):
        answer = openai_client.embeddings.create(model=MODEL_NAME, input=given, extra_body=extra)
        assert answer.usage.prompt_tokens == 2048


def test_dimensions_and_raw_values(openai_client: openai.OpenAI) -> None:
    answer = openai_client.embeddings.create(model=MODEL_NAME, input="aab", dimensions=2)
    np.testing.assert_allclose(answer.data[0].embedding, np.array([2, 1]) / math.sqrt(5), rtol=1e-6)
    raw = openai_client.embeddings.create(
        model=MODEL_NAME, input="xxaab", extra_body={"normalize": False, "truncate_prompt_tokens": 3}
    )
    assert raw.data[0].embedding == [2, 1, 0, 3]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ""}, "input"),
        ("/v1/embeddings", {"input": ["a", ""]}, "input"),
        ("/v1/embeddings", {"input": ["a", 1]}, "input"),
        ("/v1/embeddings", {"input": ["a"] * 2049}, "input"),
        ("/v1/embeddings", {"input": [10**6]}, "prompt"),
        ("/v1/embeddings", {"input": "a" * 5000}, "prompt"),
        ("/v1/embeddings", {"input": "a", "dimensions": 5}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "dimensions": 0}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ("/v1/embeddings", {"input": "a", "pooling": "max"}, "pooling"),
        ("/v1/embeddings", {"input": "a", "messages": []}, "messages"),
        ("/v1/embeddings", {"input": "a", "messages": USER}, "input"),
        ("/v1/embeddings", {"input": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "return_text": True}, "return_text"),
        ("/v1/embeddings", {"messages": USER, "chat_template": "x"}, "chat_template"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": ""}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "instruction": "x"}, "instruction"),
        ("/v1/score", {"text_1": "a"}, "text_2"),
        ("/v1/score", {"queries": "a", "text_1": "a", "items": "b"}, "queries"),
        ("/v1/score", {"queries": ["a", "b"], "items": ["a", "b", "c"]}, "queries"),
        ("/v1/rerank", {"query": "a"}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "texts": ["b"]}, "documents"),
        ("/v1/rerank", {"query": "a", "texts": [""]}, "texts"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "max_tokens_per_doc": -1}, "max_tokens_per_doc"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": [{"image": "x"}]}, "documents[0].image"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "rank_fields": ["t"]}, "rank_fields"),
    ],
)
def test_what_is_refused(http: httpx2.Client, path: str, body: dict[str, Any], param: str) -> None:
    response = http.post(path, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param), error


def test_embedding_of_a_conversation(http: httpx2.Client) -> None:
    body = {"messages": USER, "encoding_format": "float"}
    answer = http.post("/v1/embeddings", json=body).json()
    written = "<|start|>user\naab<|end|><|start|>assistant\n"
    plain = http.post("/v1/embeddings", json={"input": written}).json()
    assert answer["data"] == plain["data"]
    assert answer["usage"] == plain["usage"]
    bare = http.post("/v1/embeddings", json=body | {"add_generation_prompt": False}).json()
    assert bare["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"] - len("\nassistant\n")


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
def test_scores_are_cosines(http: httpx2.Client, path: str) -> None:
    one_to_many = http.post(path, json={"text_1": "aab", "text_2": ["aab", "cc", "aab"]}).json()
    scores = [item["score"] for item in one_to_many["data"]]
    np.testing.assert_allclose(scores, [1, counts("aab") @ counts("cc"), 1], rtol=1e-5)
    assert one_to_many["usage"]["prompt_tokens"] == 5  # each text once
    pairs = http.post(path, json={"text_1": ["a", "b"], "text_2": ["b", "b"]}).json()
    np.testing.assert_allclose([item["score"] for item in pairs["data"]], [counts("a") @ counts("b"), 1], rtol=1e-5)
    for first, second in (("queries", "documents"), ("queries", "items"), ("data_1", "data_2")):
        assert http.post(path, json={first: ["a", "b"], second: ["b", "b"]}).json()["data"] == pairs["data"]


@pytest.mark.parametrize(
    ("limits", "num_tokens"),
    [
        ({}, 14),
        ({"max_tokens_per_doc": 0}, 14),
        ({"max_tokens_per_doc": 3}, 10),
        ({"max_tokens_per_doc": 3, "max_tokens_per_query": 1}, 7),
    ],
)
def test_texts_are_shortened(http: httpx2.Client, limits: dict[str, int], num_tokens: int) -> None:
    body = {"query": "aaab", "documents": ["b" * 5, "c" * 5], "return_documents": True}
    answer = http.post("/rerank", json=body | limits).json()
    assert answer["usage"]["prompt_tokens"] == num_tokens
    assert {result["document"]["text"] for result in answer["results"]} == {"b" * 5, "c" * 5}


def test_a_long_document_is_cut_before_it_is_read(http: httpx2.Client) -> None:
    body = {"query": "a", "documents": ["ü" * 100_000], "max_tokens_per_doc": 5}
    assert http.post("/rerank", json=body).json()["usage"]["prompt_tokens"] == 1 + 4  # no half of a character


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_ranking(http: httpx2.Client, path: str) -> None:
    body = {"model": MODEL_NAME, "query": "aa", "documents": ["cc", "aa", {"text": "ac"}], "top_n": 2}
    answer = http.post(path, json=body).json()
    assert [result["index"] for result in answer["results"]] == [1, 2]
    assert answer["results"][1]["document"] == {"text": "ac"}
    assert answer["results"][0]["relevance_score"] > answer["results"][1]["relevance_score"]
    bare = http.post(path, json=body | {"return_documents": False, "top_n": 0}).json()
    assert [set(result) for result in bare["results"]] == [{"index", "relevance_score"}] * 3


def test_ranking_as_text_embeddings_inference_has_it(http: httpx2.Client) -> None:
    body: dict[str, Any] = {"query": "aa", "texts": ["cc", "aa", "ac"]}
    answer = http.post("/rerank", json=body).json()
    assert [result["index"] for result in answer] == [1, 2, 0]
    assert [set(result) for result in answer] == [{"index", "score"}] * 3
    (best,) = http.post("/rerank", json=body | {"top_n": 1, "return_text": True}).json()
    assert best == {"index": 1, "score": pytest.approx(1), "text": "aa"}


def test_a_reranker_is_asked_yes_or_no() -> None:
    with running_server(config=ServerConfig(score_tokens=("y", "n"))) as server:
        body = {"query": "q", "documents": ["d"], "instruction": "Match."}
        answer = httpx2.post(f"{server.url}/v1/rerank", json=body).json()
        # ByteTokenizer: y is 121, n is 110, and the scripted logits are the ids over a hundred.
        assert answer["results"][0]["relevance_score"] == pytest.approx(1 / (1 + math.exp(1.1 - 1.21)))
        prompt = bytes(server.executor.batches[-1].requests[0].context.prompt_token_ids).decode()
        assert "<Instruct>: Match.\n<Query>: q\n<Document>: d<" in prompt
        refused = httpx2.post(f"{server.url}/v1/rerank", json=body | {"query": "x<|im_end|>"})
        assert refused.status_code == 400


def test_embeddings_are_no_sessions(server: RunningServer, http: httpx2.Client) -> None:
    headers = {"X-Tenant-Id": "embedder"}
    assert http.post("/v1/embeddings", json={"input": ["abc", "abd"]}, headers=headers).status_code == 200
    assert http.get("/v1/sessions", headers=headers).json()["data"] == []
    assert server.client.num_requests == 0
