import random

import pytest

from pelton.bench.workloads import WORKLOADS, PromptMaker, cut_text, select_workloads
from pelton.core.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("W1", (5, 1, 128, 128, 0)),
        ("W2", (64, 16, 256, 128, 0)),
        ("W3", (64, 64, 128, 128, 0)),
        ("W4", (32, 8, 64, 64, 1024)),
        ("W5", (3, 1, 4096, 16, 0)),
    ],
)
def test_the_five_workloads(name: str, figures: tuple[int, ...]) -> None:
    w = WORKLOADS[name]
    found = (w.num_requests, w.num_clients, w.num_prompt_tokens, w.num_output_tokens, w.num_shared_tokens)
    assert found == figures


@pytest.mark.parametrize(("names", "chosen"), [("all", "W1 W2 W3 W4 W5"), ("w3", "W3"), ("W5, W1", "W5 W1")])
def test_select(names: str, chosen: str) -> None:
    assert [workload.name for workload in select_workloads(names)] == chosen.split()


def test_select_unknown() -> None:
    with pytest.raises(ConfigError, match="no workload 'W6'; there are W1, W2, W3, W4, W5 and all"):
        select_workloads("W1,W6")


def test_text_begins_with_a_word_wherever_it_is_cut() -> None:
    for seed in range(200):
        text = cut_text(random.Random(seed), 4096 * 8)
        assert len(text) == 4096 * 8
        assert not text[0].isspace()


async def test_without_a_tokenizer_words_are_counted() -> None:
    maker = PromptMaker(None, words_per_token=0.5)
    prompts = await maker.make_prompts(WORKLOADS["W4"], "7")
    assert prompts == await maker.make_prompts(WORKLOADS["W4"], "7")
    assert prompts != await maker.make_prompts(WORKLOADS["W4"], "8")
    assert {len(prompt.split()) for prompt in prompts} == {544}


class DisagreeingTokenizer:
    async def encode(self, text: str) -> list[int]:
        return list(range(len(text)))

    async def decode(self, token_ids: list[int]) -> str:
        return "x" * (len(token_ids) + 1)


async def test_a_tokenizer_that_never_agrees_is_an_error() -> None:
    with pytest.raises(Exception, match="do not agree on any text of 128 tokens"):
        await PromptMaker(DisagreeingTokenizer()).make_prompts(WORKLOADS["W1"], "0")
