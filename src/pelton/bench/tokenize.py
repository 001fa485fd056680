"""The server's own tokenizer, in vLLM's dialect of /tokenize or llama.cpp's."""

from __future__ import annotations

import random
from typing import Any

from pelton.bench.client import ServerClient
from pelton.bench.errors import BenchError
from pelton.bench.workloads import PromptMaker, cut_words

_SAMPLE = "A short text, to see whether it comes back as it was."


class ServerTokenizer:
    """`text_key` is what the dialect calls text: prompt (vLLM, Pelton) or content (llama.cpp)."""

    def __init__(self, client: ServerClient, text_key: str) -> None:
        self._client = client
        self._text_key = text_key
        self._no_special = "add_special_tokens" if text_key == "prompt" else "add_special"

    async def encode(self, text: str) -> list[int]:
        body = {"model": self._client.model, self._text_key: text, self._no_special: False}
        answer = await self._post("/tokenize", body)
        return [int(token_id) for token_id in answer["tokens"]]

    async def decode(self, token_ids: list[int]) -> str:
        answer = await self._post("/detokenize", {"model": self._client.model, "tokens": token_ids})
        return str(answer[self._text_key])

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        status, answer = await self._client.post(path, body)
        if status != 200 or not isinstance(answer, dict):
            raise BenchError(f"{self._client.base_url}{path}: HTTP {status}: {answer}")
        return answer


async def find_tokenizer(client: ServerClient) -> ServerTokenizer | None:
    """The dialect that gives a sample text back as it was; None where the server offers neither."""
    for text_key in ("prompt", "content"):
        tokenizer = ServerTokenizer(client, text_key)
        try:
            token_ids = await tokenizer.encode(_SAMPLE)
            if token_ids and (await tokenizer.decode(token_ids)).strip() == _SAMPLE:
                return tokenizer
        except (BenchError, KeyError, TypeError, ValueError):
            continue
    return None


async def make_prompt_maker(clients: list[ServerClient]) -> PromptMaker:
    """Prompts for servers of one model: counted by the first of them that has a tokenizer to ask.

    Where none has, the ratio of words to tokens is measured with one request.
    """
    for client in clients:
        tokenizer = await find_tokenizer(client)
        if tokenizer is not None:
            return PromptMaker(tokenizer)
    return await _calibrate(clients[0])


async def _calibrate(client: ServerClient) -> PromptMaker:
    num_words = 2000
    record = await client.complete(cut_words(random.Random("calibration"), num_words), 1)
    if record.error is None and record.num_prompt_tokens:
        return PromptMaker(None, num_words / record.num_prompt_tokens)
    return PromptMaker(None)
