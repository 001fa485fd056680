"""The five workloads, and their prompts: real text of an exact length, from a seed."""

from __future__ import annotations

import hashlib
import pydoc_data.topics
import random
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from pelton.bench.errors import BenchError
from pelton.core.errors import ConfigError

# Some slices of the text do not keep their length when they are tokenized again.
_MAX_TRIES = 64
# No tokenizer in use takes more characters of English to a token, over a long text.
_MAX_CHARS_PER_TOKEN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Closed loop: `num_clients` clients each send the next request when their last one ended."""

    name: str
    description: str
    num_requests: int
    num_clients: int
    num_prompt_tokens: int  # of the request's own, after the shared prefix
    num_output_tokens: int
    num_shared_tokens: int = 0  # of the prefix that all requests of a run begin with

    @property
    def num_total_prompt_tokens(self) -> int:
        return self.num_shared_tokens + self.num_prompt_tokens


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload(
            name="W1",
            description="one client",
            num_requests=5,
            num_clients=1,
            num_prompt_tokens=128,
            num_output_tokens=128,
        ),
        Workload(
            name="W2",
            description="16 clients, steady",
            num_requests=64,
            num_clients=16,
            num_prompt_tokens=256,
            num_output_tokens=128,
        ),
        Workload(
            name="W3",
            description="64 at once",
            num_requests=64,
            num_clients=64,
            num_prompt_tokens=128,
            num_output_tokens=128,
        ),
        Workload(
            name="W4",
            description="8 clients, 1,024 shared tokens",
            num_requests=32,
            num_clients=8,
            num_prompt_tokens=64,
            num_output_tokens=64,
            num_shared_tokens=1024,
        ),
        Workload(
            name="W5",
            description="one client, long prompt",
            num_requests=3,
            num_clients=1,
            num_prompt_tokens=4096,
            num_output_tokens=16,
        ),
    )
}

WARM_UP = Workload(
    name="warm-up", description="", num_requests=2, num_clients=2, num_prompt_tokens=128, num_output_tokens=8
)


def select_workloads(names: str) -> list[Workload]:
    """`W1`, `W1,W4` or `all`. Raises `ConfigError`."""
    if names.lower() == "all":
        return list(WORKLOADS.values())
    chosen = []
    for name in names.split(","):
        if name.strip().upper() not in WORKLOADS:
            raise ConfigError(f"there is no workload {name!r}; there are {', '.join(WORKLOADS)} and all")
        chosen.append(WORKLOADS[name.strip().upper()])
    return chosen


class PromptTokenizer(Protocol):
    """The tokenizer of the server under test, asked over HTTP."""

    async def encode(self, text: str) -> list[int]: ...

    async def decode(self, token_ids: list[int]) -> str: ...


@cache
def load_corpus() -> str:
    """Python's own documentation topics: real English with code, about 110,000 tokens, on every machine."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


def corpus_digest() -> str:
    """Changes with the version of Python: prompts are the same only where this is the same."""
    return hashlib.sha256(load_corpus().encode()).hexdigest()[:12]


class PromptMaker:
    """Makes a workload's prompts. The same `seed` gives the same prompts; another run needs another seed,
    because a prompt seen before comes from the server's prefix cache.

    Without a tokenizer (not every server offers one) lengths are approximate: words are counted, at
    `words_per_token`.
    """

    def __init__(self, tokenizer: PromptTokenizer | None, words_per_token: float = 0.6) -> None:
        self._tokenizer = tokenizer
        self._words_per_token = words_per_token

    @property
    def is_exact(self) -> bool:
        return self._tokenizer is not None

    async def make_prompts(self, workload: Workload, seed: str) -> list[str]:
        rng = random.Random(f"{seed}/{workload.name}")
        prefix = await self._extend(rng, "", workload.num_shared_tokens) if workload.num_shared_tokens else ""
        num_tokens = workload.num_total_prompt_tokens
        return [await self._extend(rng, prefix, num_tokens) for _ in range(workload.num_requests)]

    async def make_text(self, rng: random.Random, num_tokens: int) -> str:
        return await self._extend(rng, "", num_tokens)

    async def _extend(self, rng: random.Random, prefix: str, num_tokens: int) -> str:
        """Text that begins with `prefix` and is `num_tokens` long as a whole."""
        if self._tokenizer is None:
            num_words = round(num_tokens * self._words_per_token) - len(prefix.split())
            return f"{prefix} {cut_words(rng, num_words)}".strip()
        for _ in range(_MAX_TRIES):
            text = prefix + cut_text(rng, num_tokens * _MAX_CHARS_PER_TOKEN)
            token_ids = await self._tokenizer.encode(text)
            piece = await self._tokenizer.decode(token_ids[:num_tokens])
            if piece.startswith(prefix) and len(await self._tokenizer.encode(piece)) == num_tokens:
                return piece
        raise BenchError(f"the server's /tokenize and /detokenize do not agree on any text of {num_tokens} tokens")


def cut_text(rng: random.Random, num_chars: int) -> str:
    """`num_chars` characters of the corpus from the beginning of a word."""
    corpus = load_corpus()
    start = corpus.index(" ", rng.randrange(0, len(corpus) - num_chars - 256))
    while corpus[start].isspace():
        start += 1
    return corpus[start : start + num_chars]


def cut_words(rng: random.Random, num_words: int) -> str:
    words = cut_text(rng, num_words * 16).split()
    return " ".join(words[: max(1, num_words)])
