"""`LLM`, the Python face, on the real model."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pelton import LLM, SamplingParams
from pelton.core.errors import (
    ConfigError,
    ContextLengthExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    PeltonError,
)
from pelton.core.request import FinishReason

pytestmark = pytest.mark.model

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def llm(default_model_path: Path) -> Iterator[LLM]:
    with LLM(str(default_model_path), max_model_len=512, max_num_seqs=8, max_num_waiting=4) as llm:
        yield llm


def test_one_prompt_many_prompts_and_token_ids_agree(llm: LLM) -> None:
    text = "The capital of France is"
    one = llm.generate(text, GREEDY)
    assert one[0].text.startswith(" Paris")
    many = llm.generate(["def add(a, b):", text], GREEDY, progress=True)
    assert many[1].text == one[0].text
    assert llm.generate(one[0].prompt_token_ids, GREEDY)[0].text == one[0].text


def test_more_prompts_than_the_queue_takes(llm: LLM) -> None:
    answers = llm.generate([f"{index} +" for index in range(40)], SamplingParams(temperature=0, max_tokens=2))
    assert len(answers) == 40
    assert all(len(answer.sequences[0].token_ids) == 2 for answer in answers)


def test_sampling_parameters_for_each_prompt(llm: LLM) -> None:
    samplings = [SamplingParams(temperature=0, max_tokens=n, logprobs=2) for n in (1, 5)]
    answers = llm.generate(["a", "b"], samplings)
    assert [len(answer.sequences[0].token_ids) for answer in answers] == [1, 5]
    logprobs = answers[1].sequences[0].logprobs
    assert logprobs is not None
    assert [entry.token_id for entry in logprobs] == answers[1].sequences[0].token_ids
    assert all(len(entry.top) == 2 and entry.rank == 1 for entry in logprobs)
    with pytest.raises(InvalidRequestError, match="1 prompts but 2"):
        llm.generate("a", samplings)


def test_n_and_seed(llm: LLM) -> None:
    sampling = SamplingParams(temperature=1.2, n=3, seed=11, max_tokens=12)
    first, second = (llm.generate("Once", sampling)[0] for _ in range(2))
    assert [sequence.text for sequence in first.sequences] == [sequence.text for sequence in second.sequences]
    assert len({sequence.text for sequence in first.sequences}) == 3


def test_chat_and_stop(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Say hello in one word."}]
    answer = llm.chat(messages, SamplingParams(temperature=0, max_tokens=20))[0]
    assert "hello" in answer.text.lower()
    assert answer.sequences[0].finish_reason is FinishReason.STOP
    counted = llm.generate("1, 2, 3, 4,", SamplingParams(temperature=0, max_tokens=30, stop=("7",)))[0]
    assert counted.text == " 5, 6, "
    assert counted.sequences[0].stop_reason == "7"


def test_streamed_deltas_make_the_answer(llm: LLM) -> None:
    deltas = list(llm.stream("The capital of France is", GREEDY))
    assert "".join(delta.text for delta in deltas) == llm.generate("The capital of France is", GREEDY)[0].text
    assert len(deltas) > 1
    for _ in llm.stream("Count:", SamplingParams(temperature=0, max_tokens=400)):
        break  # leaving early cancels
    llm.generate("a", GREEDY)
    assert llm.stats.num_blocks_used == 0


def test_prompt_logprobs(llm: LLM) -> None:
    answer = llm.generate("The quick brown fox", SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1))[0]
    assert answer.prompt_logprobs is not None
    assert [entry.token_id for entry in answer.prompt_logprobs] == answer.prompt_token_ids[1:]
    assert all(entry.logprob <= 0 for entry in answer.prompt_logprobs)


def test_threads_share_the_engine(llm: LLM) -> None:
    alone = llm.generate("Two plus two is", GREEDY)[0].text
    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(lambda _: llm.generate("Two plus two is", GREEDY)[0].text, range(12)))
    assert texts == [alone] * 12


def test_errors_are_typed_and_cost_nobody_else(llm: LLM) -> None:
    with pytest.raises(ContextLengthExceededError):
        llm.generate(["fine", "x " * 600], GREEDY)
    with pytest.raises(ContextLengthExceededError):
        next(iter(llm.stream("x " * 600, GREEDY)))
    with pytest.raises(InvalidRequestError):
        llm.generate([[10**9]], GREEDY)
    assert llm.generate("fine", GREEDY)[0].text
    assert llm.stats.num_running == 0


def test_settings_and_models_that_are_not_there(default_model_path: Path) -> None:
    with pytest.raises(ConfigError, match="the nearest is max_num_seqs"):
        LLM(str(default_model_path), max_num_seq=4)
    with pytest.raises(ModelNotFoundError):
        LLM("no-such-model")
    with pytest.raises(ConfigError, match="at most 32768"):
        LLM(str(default_model_path), max_model_len=10**6)


def test_a_closed_llm_says_so(default_model_path: Path) -> None:
    llm = LLM(str(default_model_path), max_model_len=64)
    llm.close()
    llm.close()
    with pytest.raises(PeltonError, match="closed"):
        llm.generate("a", GREEDY)
