"""Parameters beyond the basics: each changes what it says it changes, or is refused with what would do instead."""

from __future__ import annotations

from typing import Any

import httpx2
import openai
import pytest

from pelton.serving.openai.requests import ChatRequest, CompletionRequest, _neutral_values
from tests.serving.make import ANSWER, MODEL_NAME, RunningServer

USER: Any = [{"role": "user", "content": "hi"}]
PATHS = {
    "/v1/chat/completions": ({"messages": USER}, ChatRequest),
    "/v1/completions": ({"prompt": "a"}, CompletionRequest),
}
OTHERS = {"grammar", "tools"}


def create(client: openai.OpenAI, **options: Any) -> Any:
    return client.completions.create(model=MODEL_NAME, **({"prompt": "ab"} | options))


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_supported_is_refused_by_name(http: httpx2.Client, path: str) -> None:
    body, struct = PATHS[path]
    names = [name for name, _ in _neutral_values(struct)]
    assert len(names) > 15
    for name in names:
        response = http.post(path, json=body | {name: {"anything": 7}, "max_tokens": 1})
        assert response.status_code == 400, name
        error = response.json()["error"]
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")
        assert len(error["message"]) > 20


def test_best_of_answers_with_the_best(openai_client: openai.OpenAI) -> None:
    answer = create(openai_client, n=2, best_of=5, temperature=1.0, seed=3, max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].logprobs is None
    assert answer.usage.completion_tokens == 5 * 4  # all that were made


@pytest.mark.parametrize(
    ("options", "param"), [({"n": 3, "best_of": 2}, "best_of"), ({"best_of": 2, "stream": True}, "best_of")]
)
def test_best_of_is_checked(http: httpx2.Client, options: Any, param: str) -> None:
    response = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1} | options)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("num_kept", [3, 50, -1])
def test_the_last_tokens_of_a_prompt_are_kept(openai_client: openai.OpenAI, num_kept: int) -> None:
    extra = {"truncate_prompt_tokens": num_kept, "return_token_ids": True}
    answer = create(openai_client, prompt="abcdef", max_tokens=1, echo=True, extra_body=extra)
    kept = "abcdef"[-num_kept:] if num_kept in range(1, 6) else "abcdef"
    assert answer.choices[0].prompt_token_ids == list(kept.encode())
    assert answer.choices[0].text == kept + ANSWER[0]
    assert answer.usage.prompt_tokens == len(kept)


def test_the_first_tokens_of_a_prompt_are_kept(openai_client: openai.OpenAI) -> None:
    extra = {"truncate_prompt_tokens": 2, "truncation_side": "right", "return_token_ids": True}
    answer = create(openai_client, prompt="abcdef", max_tokens=1, extra_body=extra)
    assert answer.choices[0].prompt_token_ids == list(b"ab")


def test_prompts_as_texts_and_token_ids(openai_client: openai.OpenAI) -> None:
    extra = {"return_token_ids": True}
    answer = create(openai_client, prompt=["ab", [99, 100]], max_tokens=1, extra_body=extra)
    assert [choice.prompt_token_ids for choice in answer.choices] == [[97, 98], [99, 100]]


def test_a_prompt_beyond_the_context_can_be_truncated(openai_client: openai.OpenAI) -> None:
    for prompt in ("x" * 3000, [120] * 3000):
        answer = create(openai_client, prompt=prompt, max_tokens=8, extra_body={"truncate_prompt_tokens": -1})
        assert answer.usage.prompt_tokens == 2048 - 8
    chat = openai_client.chat.completions.create(
        model=MODEL_NAME, messages=USER, max_tokens=2, extra_body={"truncate_prompt_tokens": 4}
    )
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == 4


def test_tokens_as_token_ids(openai_client: openai.OpenAI) -> None:
    extra = {"return_tokens_as_token_ids": True}
    answer = create(openai_client, logprobs=1, max_tokens=2, extra_body=extra)
    assert answer.choices[0].logprobs.tokens == ["token_id:71", "token_id:114"]
    assert list(answer.choices[0].logprobs.top_logprobs[0]) == ["token_id:71"]
    chat = openai_client.chat.completions.create(
        model=MODEL_NAME, messages=USER, max_tokens=1, logprobs=True, top_logprobs=1, extra_body=extra
    )
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content is not None
    assert chat.choices[0].logprobs.content[0].token == "token_id:71"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_named_tokens(openai_client: openai.OpenAI, stream: bool) -> None:
    extra = {"return_tokens_as_token_ids": True, "logprob_token_ids": [5, 250, 9]}
    answer: Any = create(openai_client, logprobs=1, max_tokens=1, extra_body=extra, stream=stream)
    answer = next(iter(answer)) if stream else answer
    named = ["token_id:71", "token_id:5", "token_id:250", "token_id:9"]
    assert list(answer.choices[0].logprobs.top_logprobs[0]) == named
    options: Any = {"model": MODEL_NAME, "messages": USER, "max_tokens": 1, "logprobs": True, "stream": stream}
    chat: Any = openai_client.chat.completions.create(**options, extra_body=extra)
    choice = next(chunk for chunk in chat if chunk.choices[0].logprobs).choices[0] if stream else chat.choices[0]
    assert [entry.token for entry in choice.logprobs.content[0].top_logprobs] == named


@pytest.mark.parametrize(
    "fields",
    [
        {"logprob_token_ids": [5]},
        {"logprob_token_ids": [5], "best_of": 2},
        {"logprob_token_ids": [5], "logprobs": 1, "echo": True},
        {"logprob_token_ids": [5] * 129, "logprobs": 1},
        {"logprob_token_ids": [1000], "logprobs": 1},
        {"logprob_token_ids": [], "logprobs": 1},
    ],
)
def test_named_tokens_that_cannot_be_reported(http: httpx2.Client, fields: dict[str, Any]) -> None:
    response = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1} | fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "logprob_token_ids"), response.text


def test_bad_words_reach_the_worker(server: RunningServer, openai_client: openai.OpenAI) -> None:
    create(openai_client, max_tokens=1, extra_body={"bad_words": ["no", "x"]})
    sampling = server.executor.batches[-1].requests[0].sampling
    assert sampling.banned_sequences == ((110, 111), (32, 110, 111), (120,), (32, 120))
