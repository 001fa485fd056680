"""Log-probabilities in the shapes of the two endpoints."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from pelton.core.output import TokenLogprobs
from pelton.serving.openai.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from pelton.weights.tokenizer import Tokenizer

# JSON has no infinity; this is what OpenAI and vLLM send for a token that cannot come.
MIN_LOGPROB = -9999.0


class TokenSpelling:
    """Token ids as text. A token that holds part of a character reads `bytes:\\xe2\\x80`, as OpenAI has it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def text(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            data = self._tokenizer.token_bytes(token_id)
            try:
                text = data.decode()
            except UnicodeDecodeError:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            self._texts[token_id] = text
        return text

    def bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

    def is_special(self, token_id: int) -> bool:
        return self._tokenizer.is_special(token_id)


class TokenIdSpelling(TokenSpelling):
    """Token ids as `token_id:NUMBER`, which no two tokens share (`return_tokens_as_token_ids`)."""

    def text(self, token_id: int) -> str:
        return f"token_id:{token_id}"


def chat_logprobs(logprobs: Iterable[TokenLogprobs], num_top: int, spelling: TokenSpelling) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            TokenLogprob(
                token=spelling.text(entry.token_id),
                logprob=max(entry.logprob, MIN_LOGPROB),
                bytes=list(spelling.bytes(entry.token_id)),
                top_logprobs=[
                    TopLogprob(
                        token=spelling.text(token_id),
                        logprob=max(logprob, MIN_LOGPROB),
                        bytes=list(spelling.bytes(token_id)),
                    )
                    for token_id, logprob in entry.top[:num_top]
                ],
            )
            for entry in logprobs
        ]
    )


class CompletionLogprobsBuilder:
    """Logprobs of one sequence, in as many parts as it comes; keeps the text offset between them."""

    def __init__(self, num_top: int, spelling: TokenSpelling, *, skip_special_tokens: bool) -> None:
        self._num_top = num_top
        self._spelling = spelling
        self._skip_special_tokens = skip_special_tokens
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def build(self, logprobs: Iterable[TokenLogprobs]) -> CompletionLogprobs:
        result = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        self._add(result, logprobs, self._skip_special_tokens)
        return result

    def build_echo(
        self, first_token_id: int, prompt: Iterable[TokenLogprobs], output: Iterable[TokenLogprobs]
    ) -> CompletionLogprobs:
        """Of an echoed prompt, whose first token has none, and the output that came with it."""
        result = CompletionLogprobs(
            tokens=[self._spelling.text(first_token_id)], token_logprobs=[None], top_logprobs=[None], text_offset=[0]
        )
        self._advance(first_token_id)
        self._add(result, prompt, False)
        self._add(result, output, self._skip_special_tokens)
        return result

    def _add(self, result: CompletionLogprobs, logprobs: Iterable[TokenLogprobs], skip_special_tokens: bool) -> None:
        text = self._spelling.text
        for entry in logprobs:
            logprob = max(entry.logprob, MIN_LOGPROB)
            # The token itself is first, as vLLM has it, also where it is not one of the most likely.
            top = {text(entry.token_id): logprob}
            for token_id, value in entry.top[: self._num_top]:
                top.setdefault(text(token_id), max(value, MIN_LOGPROB))
            result.tokens.append(text(entry.token_id))
            result.token_logprobs.append(logprob)
            result.top_logprobs.append(top)
            result.text_offset.append(self._offset)
            if not (skip_special_tokens and self._spelling.is_special(entry.token_id)):
                self._advance(entry.token_id)

    def _advance(self, token_id: int) -> None:
        self._offset += len(self._decoder.decode(self._spelling.bytes(token_id)))


def prompt_logprobs(logprobs: Sequence[TokenLogprobs], num_top: int, spelling: TokenSpelling) -> PromptLogprobs:
    """vLLM's shape; the first token has none."""
    result: PromptLogprobs = [None]
    for entry in logprobs:
        ranked = [(entry.token_id, entry.logprob, entry.rank)]
        ranked += [
            (token_id, logprob, rank)
            for rank, (token_id, logprob) in enumerate(entry.top[:num_top], 1)
            if token_id != entry.token_id
        ]
        result.append(
            {
                str(token_id): PromptLogprob(
                    logprob=max(logprob, MIN_LOGPROB), rank=rank, decoded_token=spelling.text(token_id)
                )
                for token_id, logprob, rank in ranked
            }
        )
    return result
