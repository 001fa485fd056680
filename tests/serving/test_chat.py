"""/v1/chat/completions through the official client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from pelton.weights.tensors import GenerationDefaults
from tests.serving.make import ANSWER, MODEL_NAME, ByteTokenizer, RunningServer, running_server

MESSAGES: Any = [{"role": "user", "content": "hello"}]
PROMPT = "<|start|>user\nhello<|end|><|start|>assistant\n"
NUM_PROMPT_TOKENS = len("Suser\nhelloESassistant\n")
NUM_ANSWER_TOKENS = len(ANSWER.encode()) + 1  # and the end of text


def test_answer(openai_client: openai.OpenAI) -> None:
    answer = openai_client.chat.completions.create(model=MODEL_NAME, messages=MESSAGES)
    (choice,) = answer.choices
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", ANSWER)
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL_NAME
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint.startswith("fp_")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == NUM_PROMPT_TOKENS
    assert answer.usage.completion_tokens == NUM_ANSWER_TOKENS
    assert answer.usage.total_tokens == NUM_PROMPT_TOKENS + NUM_ANSWER_TOKENS


def test_cached_tokens_are_reported_and_salted(openai_client: openai.OpenAI) -> None:
    def cached(salt: str, tenant: str = "default") -> int:
        answer = openai_client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": "a long prompt that is seen again " * 4}],
            max_tokens=1,
            extra_body={"cache_salt": salt},
            extra_headers={"X-Tenant-Id": tenant},
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert cached("one") == 0
    assert cached("one") > 100
    assert cached("two") == 0
    assert cached("one", "other-tenant") == 0


def test_the_fingerprint_is_that_of_what_runs(openai_client: openai.OpenAI) -> None:
    def ask(client: openai.OpenAI, **options: Any) -> Any:
        return client.chat.completions.create(model=MODEL_NAME, messages=MESSAGES, max_tokens=2, **options)

    expected = ask(openai_client).system_fingerprint
    assert {chunk.system_fingerprint for chunk in ask(openai_client, stream=True)} == {expected}
    text: Any = openai_client.completions.create(model=MODEL_NAME, prompt="a", max_tokens=2)
    assert text.system_fingerprint == expected
    parts: Any = openai_client.completions.create(model=MODEL_NAME, prompt="a", max_tokens=2, stream=True)
    assert {chunk.system_fingerprint for chunk in parts} == {expected}
    fingerprints = []
    for kernels in ("none", "other"):
        with running_server(kernels=kernels) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
            fingerprints.append(ask(client).system_fingerprint)
    assert fingerprints[0] == expected != fingerprints[1]


def test_stream_has_the_same_text(openai_client: openai.OpenAI) -> None:
    chunks = list(openai_client.chat.completions.create(model=MODEL_NAME, messages=MESSAGES, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert all(delta.role is None for delta in deltas[1:])
    assert "".join(delta.content or "" for delta in deltas) == ANSWER
    assert "�" not in "".join(delta.content or "" for delta in deltas)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("continuous", [False, True])
def test_stream_usage(openai_client: openai.OpenAI, continuous: bool) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": continuous}
    chunks = list(
        openai_client.chat.completions.create(
            model=MODEL_NAME, messages=MESSAGES, stream=True, stream_options=options, n=2, max_tokens=4
        )
    )
    *rest, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (NUM_PROMPT_TOKENS, 8)
    assert all(chunk.choices for chunk in rest)
    counts = [chunk.usage.completion_tokens for chunk in rest if chunk.usage is not None]
    assert counts == (sorted(counts) if continuous else [])
    assert bool(counts) == continuous


def test_continuous_usage_needs_usage(openai_client: openai.OpenAI) -> None:
    options: Any = {"include_usage": False, "continuous_usage_stats": True}
    chat = openai_client.chat.completions.create(
        model=MODEL_NAME, messages=MESSAGES, stream=True, stream_options=options, max_tokens=4
    )
    text = openai_client.completions.create(
        model=MODEL_NAME, prompt="a", stream=True, stream_options=options, max_tokens=4
    )
    assert [chunk.usage for chunk in chat if chunk.usage or not chunk.choices] == []
    assert [chunk.usage for chunk in text if chunk.usage or not chunk.choices] == []


async def test_async_client(server: RunningServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(model=MODEL_NAME, messages=MESSAGES)
        assert answer.choices[0].message.content == ANSWER
        stream = await client.chat.completions.create(model=MODEL_NAME, messages=MESSAGES, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == ANSWER


def test_n_choices_differ_and_share_the_prompt(openai_client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL_NAME, "messages": MESSAGES, "n": 3, "temperature": 1.0, "seed": 7, "max_tokens": 12}
    answer = openai_client.chat.completions.create(**options)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (NUM_PROMPT_TOKENS, 36)
    streamed = ["", "", ""]
    finish_reasons: list[tuple[int, str]] = []
    for chunk in openai_client.chat.completions.create(**options, stream=True):
        choice = chunk.choices[0]
        streamed[choice.index] += choice.delta.content or ""
        if choice.finish_reason is not None:
            finish_reasons.append((choice.index, choice.finish_reason))
    assert streamed == texts
    assert sorted(finish_reasons) == [(0, "length"), (1, "length"), (2, "length")]


def test_seed_decides(openai_client: openai.OpenAI) -> None:
    def text(seed: int) -> str | None:
        answer = openai_client.chat.completions.create(
            model=MODEL_NAME, messages=MESSAGES, temperature=0.9, seed=seed, max_tokens=16
        )
        return answer.choices[0].message.content

    assert text(1) == text(1) != text(2)


@pytest.mark.parametrize(
    ("stop", "extra", "expected", "reason"),
    [
        ("quick", {}, "Grüße 😀, the ", "quick"),
        (["nowhere", " fox"], {}, "Grüße 😀, the quick brown", " fox"),
        ("😀", {}, "Grüße ", "😀"),
        ("quick", {"include_stop_str_in_output": True}, "Grüße 😀, the quick", "quick"),
        (None, {"stop_token_ids": [ord(",")]}, "Grüße 😀", ord(",")),
    ],
)
def test_stop(openai_client: openai.OpenAI, stop: Any, extra: Any, expected: str, reason: Any) -> None:
    options: Any = {"model": MODEL_NAME, "messages": MESSAGES, "stop": stop, "extra_body": extra}
    answer = openai_client.chat.completions.create(**options)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == reason  # type: ignore[attr-defined]
    chunks = list(openai_client.chat.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_lengths(openai_client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL_NAME, "messages": MESSAGES}
    answer = openai_client.chat.completions.create(**options, max_completion_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    past_end = openai_client.chat.completions.create(**options, max_tokens=80, extra_body={"ignore_eos": True})
    assert past_end.usage is not None
    assert past_end.usage.completion_tokens == 80
    at_least = openai_client.chat.completions.create(**options, stop="quick", extra_body={"min_tokens": 40})
    assert at_least.usage is not None
    assert at_least.usage.completion_tokens >= 40


def test_logit_bias_and_allowed_ids_reach_the_sampler(server: RunningServer, openai_client: openai.OpenAI) -> None:
    answer = openai_client.chat.completions.create(
        model=MODEL_NAME, messages=MESSAGES, logit_bias={"120": 100, "121": -5}, max_tokens=4,
        extra_body={"allowed_token_ids": [120, 121], "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1,
                    "priority": -3, "cache_salt": "s"},
        presence_penalty=0.5, frequency_penalty=-0.5, top_p=0.9, user="somebody", metadata={"a": "b"}, store=False,
    )  # fmt: skip
    assert answer.choices[0].message.content == "xxxx"
    sampling = server.executor.batches[-1].requests[0].sampling
    assert sampling.logit_bias == {120: 100.0, 121: -5.0}
    assert sampling.allowed_token_ids == (120, 121)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (0, 0.1, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.top_p) == (0.5, -0.5, 0.9)


def test_logprobs(openai_client: openai.OpenAI) -> None:
    options: Any = {
        "model": MODEL_NAME, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "max_tokens": 6
    }  # fmt: skip
    answer = openai_client.chat.completions.create(**options)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert [entry.token for entry in content] == ["G", "r", "bytes:\\xc3", "bytes:\\xbc", "bytes:\\xc3", "bytes:\\x9f"]
    assert b"".join(bytes(entry.bytes or ()) for entry in content).decode() == "Grüß"
    assert [len(entry.top_logprobs) for entry in content] == [2] * 6
    assert content[0].top_logprobs[0].token == "G"
    assert content[0].logprob == content[0].top_logprobs[0].logprob == pytest.approx(-0.1)
    streamed = [
        entry
        for chunk in openai_client.chat.completions.create(**options, stream=True)
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content or ()
    ]
    assert streamed == content


def test_logprobs_without_top(openai_client: openai.OpenAI) -> None:
    answer = openai_client.chat.completions.create(model=MODEL_NAME, messages=MESSAGES, logprobs=True, max_tokens=2)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert [entry.top_logprobs for entry in answer.choices[0].logprobs.content] == [[], []]


def test_token_ids_and_prompt_logprobs(openai_client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL_NAME, "messages": MESSAGES, "max_tokens": 2}
    answer: Any = openai_client.chat.completions.create(
        **options, extra_body={"return_token_ids": True, "prompt_logprobs": 1}
    )
    assert answer.choices[0].token_ids == [ord("G"), ord("r")]
    assert len(answer.prompt_token_ids) == NUM_PROMPT_TOKENS
    assert len(answer.prompt_logprobs) == NUM_PROMPT_TOKENS
    assert answer.prompt_logprobs[0] is None
    assert answer.prompt_logprobs[1] == {"117": {"logprob": -0.1, "rank": 1, "decoded_token": "u"}}
    chunks: Any = list(
        openai_client.chat.completions.create(**options, stream=True, extra_body={"return_token_ids": True})
    )
    assert chunks[0].prompt_token_ids == answer.prompt_token_ids
    assert [token_id for chunk in chunks[1:] for token_id in chunk.choices[0].token_ids] == [ord("G"), ord("r")]


@pytest.mark.parametrize(
    ("messages", "extra", "expected"),
    [
        ([{"role": "developer", "content": "d"}], {}, "<|start|>system\nd<|end|><|start|>assistant\n"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            {},
            "<|start|>user\na\nb<|end|><|start|>assistant\n",
        ),
        ([{"role": "user", "content": "a"}], {"add_generation_prompt": False}, "<|start|>user\na<|end|>"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}],
            {"continue_final_message": True},
            "<|start|>user\na<|end|><|start|>assistant\nb ",
        ),
    ],
)
def test_prompts(server: RunningServer, openai_client: openai.OpenAI, messages: Any, extra: Any, expected: str) -> None:
    answer: Any = openai_client.chat.completions.create(
        model=MODEL_NAME, messages=messages, max_tokens=1, extra_body={"return_token_ids": True} | extra
    )
    assert answer.prompt_token_ids == ByteTokenizer().encode(expected)
    assert server.client.state == "ready"


def test_echo_of_a_continued_message(openai_client: openai.OpenAI) -> None:
    options: Any = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "So: "}],
        "max_tokens": 2,
        "extra_body": {"continue_final_message": True, "echo": True},
    }
    assert openai_client.chat.completions.create(**options).choices[0].message.content == "So: Gr"
    chunks = list(openai_client.chat.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "So: Gr"


def test_defaults_of_the_model_apply_where_the_client_is_silent() -> None:
    defaults = GenerationDefaults(temperature=0.3, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.2)
    with running_server(defaults=defaults) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        client.chat.completions.create(model=MODEL_NAME, messages=MESSAGES, max_tokens=1)
        silent = server.executor.batches[-1].requests[0].sampling
        client.chat.completions.create(
            model=MODEL_NAME, messages=MESSAGES, max_tokens=1, temperature=0, top_p=1,
            extra_body={"top_k": 0, "min_p": 0, "repetition_penalty": 1},
        )  # fmt: skip
        loud = server.executor.batches[-1].requests[0].sampling
    assert (silent.temperature, silent.top_k, silent.top_p) == (0.3, 20, 0.8)
    assert (silent.min_p, silent.repetition_penalty) == (0.05, 1.2)
    assert (loud.temperature, loud.top_k, loud.top_p, loud.min_p, loud.repetition_penalty) == (0, 0, 1, 0, 1)


def test_a_model_without_a_template_refuses_chat() -> None:
    with running_server(chat_template=None) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=MODEL_NAME, messages=MESSAGES)
        assert refused.value.code == "no_chat_template"
        assert client.completions.create(model=MODEL_NAME, prompt="a", max_tokens=1).choices[0].text == "G"
