"""/v1/completions through the official client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.serving.make import ANSWER, MODEL_NAME


def create(client: openai.OpenAI, **options: Any) -> Any:
    return client.completions.create(model=MODEL_NAME, **({"prompt": "ab"} | options))


def test_default_length_is_16(openai_client: openai.OpenAI) -> None:
    answer = create(openai_client)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16
    assert ANSWER.startswith(answer.choices[0].text.rstrip("�"))


@pytest.mark.parametrize(
    ("prompt", "num_prompts", "num_tokens"),
    [("abc", 1, 3), (["abc", "d"], 2, 4), ([97, 98], 1, 2), ([[97], [98, 99, 100]], 2, 4), (["é"] * 20, 20, 40)],
)
@pytest.mark.parametrize("stream", [False, True])
def test_prompt_forms(
    openai_client: openai.OpenAI, prompt: Any, num_prompts: int, num_tokens: int, stream: bool
) -> None:
    options: dict[str, Any] = {"prompt": prompt, "n": 2, "max_tokens": 100}
    if not stream:
        answer = create(openai_client, **options)
        usage = answer.usage
        texts = {choice.index: choice.text for choice in answer.choices}
        assert [choice.index for choice in answer.choices] == list(range(2 * num_prompts))
    else:
        texts = {}
        finished = []
        for chunk in create(openai_client, **options, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
                finished += [choice.index] if choice.finish_reason == "stop" else []
        assert sorted(finished) == list(range(2 * num_prompts))
    assert texts == dict.fromkeys(range(2 * num_prompts), ANSWER)
    assert usage.prompt_tokens == num_tokens
    assert usage.completion_tokens == 2 * num_prompts * (len(ANSWER.encode()) + 1)


@pytest.mark.parametrize("stream", [False, True])
def test_echo(openai_client: openai.OpenAI, stream: bool) -> None:
    for prompt, text in (("ab", "ab"), ([97, 257, 98], "a<|start|>b")):
        answer = create(openai_client, prompt=prompt, echo=True, max_tokens=2, stream=stream)
        parts = [chunk.choices[0].text for chunk in answer] if stream else [answer.choices[0].text]
        assert "".join(parts) == f"{text}Gr"


def test_echo_with_logprobs_scores_the_prompt(openai_client: openai.OpenAI) -> None:
    answer = create(openai_client, prompt="aéb", echo=True, logprobs=2, max_tokens=0)
    choice = answer.choices[0]
    assert choice.text == "aéb"
    assert answer.usage.completion_tokens == 0
    assert choice.logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "b"]
    assert choice.logprobs.text_offset == [0, 1, 1, 2]
    assert choice.logprobs.token_logprobs == [None, -0.1, -0.1, -0.1]
    assert choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.top_logprobs[3] == {"b": -0.1, "A": -66.0}


def test_a_cached_prompt_is_scored_whole(openai_client: openai.OpenAI) -> None:
    for _ in range(2):
        answer = create(openai_client, prompt="0123456789" * 10, echo=True, logprobs=0, max_tokens=0)
        assert len(answer.choices[0].logprobs.tokens) == 100


def test_logprobs_of_stream_and_answer_agree(openai_client: openai.OpenAI) -> None:
    options = {"prompt": ["abc", "d"], "echo": True, "logprobs": 1, "max_tokens": 9, "n": 2}
    answer = create(openai_client, **options)
    streamed: dict[int, dict[str, list[Any]]] = {}
    for chunk in create(openai_client, **options, stream=True):
        for choice in chunk.choices:
            if choice.logprobs is not None:
                for name, values in choice.logprobs.model_dump().items():
                    streamed.setdefault(choice.index, {}).setdefault(name, []).extend(values)
    for choice in answer.choices:
        assert streamed[choice.index] == choice.logprobs.model_dump()
        assert choice.logprobs.text_offset == sorted(choice.logprobs.text_offset)


def test_token_ids_and_prompt_logprobs(openai_client: openai.OpenAI) -> None:
    extra = {"return_token_ids": True, "prompt_logprobs": 0}
    answer = create(openai_client, prompt=[97, 98], max_tokens=1, extra_body=extra)
    assert answer.choices[0].token_ids == [71]
    assert answer.choices[0].prompt_token_ids == [97, 98]
    assert answer.choices[0].prompt_logprobs == [
        None,
        {"98": {"logprob": -0.1, "rank": 1, "decoded_token": "b"}},
    ]
    (chunk,) = create(openai_client, max_tokens=1, stream=True, extra_body={"return_token_ids": True})
    assert (chunk.choices[0].prompt_token_ids, chunk.choices[0].token_ids) == ([97, 98], [71])


def test_best_of_equal_to_n(openai_client: openai.OpenAI) -> None:
    assert len(create(openai_client, n=2, best_of=2, max_tokens=1).choices) == 2
