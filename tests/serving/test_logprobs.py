"""Shapes of log-probabilities that only an unlikely token shows."""

from __future__ import annotations

from typing import Any

import pytest

from pelton.core.output import TokenLogprobs
from pelton.serving.openai.logprobs import CompletionLogprobsBuilder, TokenIdSpelling, prompt_logprobs


class OneByteTokens:
    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def is_special(self, token_id: int) -> bool:  # noqa: ARG002
        return False


TOP = ((97, -0.5), (98, -1.0))
TOKENIZER: Any = OneByteTokens()


@pytest.mark.parametrize(
    ("token_id", "logprob", "rank", "ranked"),
    [
        (99, -4.0, 7, {99: (-4.0, 7), 97: (-0.5, 1), 98: (-1.0, 2)}),
        (98, -1.0, 2, {98: (-1.0, 2), 97: (-0.5, 1)}),
        (97, -0.5, 1, {97: (-0.5, 1), 98: (-1.0, 2)}),
    ],
)
def test_the_token_itself_is_first(
    token_id: int, logprob: float, rank: int, ranked: dict[int, tuple[float, int]]
) -> None:
    spelling = TokenIdSpelling(TOKENIZER)
    entry = TokenLogprobs(token_id=token_id, logprob=logprob, rank=rank, top=TOP)
    built = CompletionLogprobsBuilder(2, spelling, skip_special_tokens=True).build([entry])
    assert built.top_logprobs[0] is not None
    assert list(built.top_logprobs[0].items()) == [(f"token_id:{key}", value[0]) for key, value in ranked.items()]
    of_prompt = prompt_logprobs([entry], 2, spelling)[1]
    assert of_prompt is not None
    assert [(key, value.logprob, value.rank) for key, value in of_prompt.items()] == [
        (str(key), *value) for key, value in ranked.items()
    ]
