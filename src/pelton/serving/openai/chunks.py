"""Deltas to server-sent events: the encoders of the two streaming endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from pelton.core.output import RequestOutput, TokenLogprobs, Usage
from pelton.serving.generation import Batch
from pelton.serving.openai.answers import add_events, finish_reason_name
from pelton.serving.openai.logprobs import CompletionLogprobsBuilder, TokenSpelling, chat_logprobs
from pelton.serving.openai.responses import (
    ChatChunkChoice,
    ChatDelta,
    CompletionChoice,
    CompletionLogprobs,
    CompletionTokensDetails,
    FinishReasonName,
    PromptTokensDetails,
    UsageInfo,
)
from pelton.serving.parsing.answer import AnswerParser, AnswerPlan
from pelton.serving.sse import SSE_DONE, OpenAIStreamErrors

_encode = msgspec.json.Encoder().encode
FINISH_REASONS: dict[str, FinishReasonName] = {"stop": "stop", "length": "length"}


class UsageCounter:
    """Usage of a whole answer. The sequences of a prompt share it, so it is counted once."""

    def __init__(self, num_prompt_tokens: int, *, reports_reasoning: bool = False) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.num_output_tokens = 0
        self.num_cached_tokens = 0
        self.num_reasoning_tokens = 0
        self._reports_reasoning = reports_reasoning

    def add(self, index: int, num_output_tokens: int, usage: Usage | None) -> None:
        """Sequence `index` of a prompt made so many tokens; `usage` comes with its end."""
        self.num_output_tokens += num_output_tokens
        if usage is not None and index == 0:
            self.num_cached_tokens += usage.num_cached_tokens

    def info(self) -> UsageInfo:
        info = UsageInfo(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_output_tokens,
            total_tokens=self.num_prompt_tokens + self.num_output_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.num_cached_tokens),
        )
        if self._reports_reasoning:
            info.completion_tokens_details = CompletionTokensDetails(reasoning_tokens=self.num_reasoning_tokens)
        return info


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """What of a request shapes its answer."""

    answer_id: str
    created: int
    model: str
    fingerprint: str
    prompts: Sequence[list[int]]
    n: int
    spelling: TokenSpelling
    logprobs: int | None = None
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echo_texts: Sequence[str] | None = None  # per prompt: what goes before its output
    drop_output: bool = False  # max_tokens was 0: only the prompt is wanted
    plan: AnswerPlan | None = None  # how to read an answer that may hold more than text
    reports_reasoning: bool = False
    is_named_tool: bool = False

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def is_plain(self) -> bool:
        """A delta's text is all that a chunk tells, until the last one."""
        return (
            self.logprobs is None
            and self.echo_texts is None
            and self.plan is None
            and not (self.return_token_ids or self.continuous_usage or self.drop_output)
        )


class _Chunks:
    """The frame around choices: encoded once an answer, since only the choices change."""

    def __init__(self, options: AnswerOptions, object_name: str) -> None:
        head = _encode(
            {
                "id": options.answer_id,
                "object": object_name,
                "created": options.created,
                "model": options.model,
                "system_fingerprint": options.fingerprint,
            }
        )
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if options.include_usage else b"]}\n\n"
        self._options = options
        self.usage = UsageCounter(options.num_prompt_tokens, reports_reasoning=options.reports_reasoning)

    def chunk(self, choice: msgspec.Struct) -> bytes:
        tail = self._tail
        if self._options.continuous_usage:
            tail = b'],"usage":' + _encode(self.usage.info()) + b"}\n\n"
        return self._head + _encode(choice) + tail

    def frame(self, choice: msgspec.Struct, member: bytes) -> tuple[bytes, bytes]:
        """What stands before and after the text of a chunk like that of `choice`, whose `member` is empty text.

        Quotes within JSON strings are escaped, so the member's spelling is found nowhere else.
        """
        before, after = self.chunk(choice).split(b'"' + member + b'":""')
        return before + b'"' + member + b'":', after

    def chunk_with(self, choice: msgspec.Struct, extra: bytes) -> bytes:
        """`extra` is a JSON member of the chunk itself."""
        return self.chunk(choice)[:-3] + b"," + extra + b"}\n\n"

    def last(self) -> bytes:
        if not self._options.include_usage:
            return SSE_DONE
        return self._head + b'],"usage":' + _encode(self.usage.info()) + b"}\n\n" + SSE_DONE


class ChatChunkEncoder(OpenAIStreamErrors):
    def __init__(self, options: AnswerOptions) -> None:
        self.is_finished = False
        self._options = options
        self._is_plain = options.is_plain
        self._chunks = _Chunks(options, "chat.completion.chunk")
        self._frames: dict[int, tuple[bytes, bytes]] = {}
        self._num_open = options.n
        self._parsers: list[AnswerParser] = []
        if options.plan is not None:
            self._parsers = [options.plan.make_parser() for _ in range(options.n)]

    def first(self) -> bytes:
        options = self._options
        content = options.echo_texts[0] if options.echo_texts is not None else ""
        choices = [
            ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=content))
            for index in range(options.n)
        ]
        if not options.return_token_ids:
            return b"".join(map(self._chunks.chunk, choices))
        ids = b'"prompt_token_ids":' + _encode(options.prompts[0])
        return b"".join(self._chunks.chunk_with(choice, ids) for choice in choices)

    def encode(self, batch: Batch) -> bytes:
        if len(batch) == 1 and len(batch[0][1]) == 1:  # the usual one
            return self._delta(batch[0][1][0])
        return b"".join([self._delta(output) for _, outputs in batch for output in outputs])

    def last(self) -> bytes:
        return self._chunks.last()

    def _make_frame(self, index: int) -> tuple[bytes, bytes]:
        choice = ChatChunkChoice(index=index, delta=ChatDelta(content=""))
        frame = self._frames[index] = self._chunks.frame(choice, b"content")
        return frame

    def _delta(self, output: RequestOutput) -> bytes:
        if self._is_plain and output.text and output.finish_reason is None:
            self._chunks.usage.num_output_tokens += len(output.token_ids)
            before, after = self._frames.get(output.index) or self._make_frame(output.index)
            return before + _encode(output.text) + after
        options = self._options
        self._chunks.usage.add(output.index, len(output.token_ids), output.usage)
        choice = ChatChunkChoice(index=output.index, delta=ChatDelta())
        has_text = bool(output.text)
        num_calls = 0
        if self._parsers:
            parser = self._parsers[output.index]
            has_text = self._parse(parser, output, choice.delta)
            num_calls = parser.num_calls
        elif has_text:
            choice.delta.content = output.text
        if options.logprobs is not None and output.logprobs:
            choice.logprobs = chat_logprobs(output.logprobs, options.logprobs, options.spelling)
        if options.return_token_ids:
            choice.token_ids = list(output.token_ids)
        if output.finish_reason is not None:
            choice.finish_reason = finish_reason_name(output.finish_reason, num_calls, is_named=options.is_named_tool)
            if output.stop_reason is not None:
                choice.stop_reason = output.stop_reason
            self._num_open -= 1
            self.is_finished = self._num_open == 0
        elif not has_text and choice.logprobs is None and not (options.return_token_ids and output.token_ids):
            return b""
        return self._chunks.chunk(choice)

    def _parse(self, parser: AnswerParser, output: RequestOutput, delta: ChatDelta) -> bool:
        """Put what came into `delta`; whether there was anything."""
        num_reasoning_tokens = parser.num_reasoning_tokens
        events = parser.push(output.text, output.token_ids)
        if output.finish_reason is not None:
            events += parser.finish()
        self._chunks.usage.num_reasoning_tokens += parser.num_reasoning_tokens - num_reasoning_tokens
        add_events(delta, events)
        return bool(events)


@dataclass(slots=True)
class _CompletionSequence:
    logprobs: CompletionLogprobsBuilder | None
    is_started: bool = False


@dataclass(slots=True)
class _CompletionPrompt:
    sequences: list[_CompletionSequence]
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


class CompletionChunkEncoder(OpenAIStreamErrors):
    """Choice `p * n + i` is sequence i of prompt p."""

    def __init__(self, options: AnswerOptions) -> None:
        self.is_finished = False
        self._options = options
        self._is_plain = options.is_plain
        self._chunks = _Chunks(options, "text_completion")
        self._num_open = options.n * len(options.prompts)
        self._frames: dict[int, tuple[bytes, bytes]] = {}
        self._prompts = [
            _CompletionPrompt([_CompletionSequence(self._make_logprobs()) for _ in range(options.n)])
            for _ in options.prompts
        ]

    def first(self) -> bytes:
        return b""

    def encode(self, batch: Batch) -> bytes:
        if len(batch) == 1 and len(batch[0][1]) == 1:  # the usual one
            return self._delta(batch[0][0], batch[0][1][0])
        return b"".join([self._delta(index, output) for index, outputs in batch for output in outputs])

    def last(self) -> bytes:
        return self._chunks.last()

    def _make_logprobs(self) -> CompletionLogprobsBuilder | None:
        options = self._options
        if options.logprobs is None:
            return None
        return CompletionLogprobsBuilder(
            options.logprobs, options.spelling, skip_special_tokens=options.skip_special_tokens
        )

    def _make_frame(self, index: int) -> tuple[bytes, bytes]:
        frame = self._frames[index] = self._chunks.frame(CompletionChoice(index=index, text=""), b"text")
        return frame

    def _delta(self, prompt_index: int, output: RequestOutput) -> bytes:
        if self._is_plain and output.text and output.finish_reason is None:
            self._chunks.usage.num_output_tokens += len(output.token_ids)
            index = prompt_index * self._options.n + output.index
            before, after = self._frames.get(index) or self._make_frame(index)
            return before + _encode(output.text) + after
        options, prompt = self._options, self._prompts[prompt_index]
        if output.prompt_logprobs:
            prompt.prompt_logprobs += output.prompt_logprobs
        if not output.token_ids and not output.text and output.finish_reason is None:
            return b""
        sequence = prompt.sequences[output.index]
        is_first, sequence.is_started = not sequence.is_started, True
        token_ids: Sequence[int] = () if options.drop_output else output.token_ids
        self._chunks.usage.add(output.index, len(token_ids), output.usage)
        choice = CompletionChoice(
            index=prompt_index * options.n + output.index, text="" if options.drop_output else output.text
        )
        choice.logprobs = self._logprobs(prompt_index, sequence, output, is_first)
        if is_first and options.echo_texts is not None:
            choice.text = options.echo_texts[prompt_index] + choice.text
        if options.return_token_ids:
            choice.token_ids = list(token_ids)
            if is_first:
                choice.prompt_token_ids = options.prompts[prompt_index]
        if output.finish_reason is not None:
            choice.finish_reason = FINISH_REASONS[output.finish_reason]
            if output.stop_reason is not None:
                choice.stop_reason = output.stop_reason
            self._num_open -= 1
            self.is_finished = self._num_open == 0
        elif not choice.text and choice.logprobs is None and not options.return_token_ids:
            return b""
        return self._chunks.chunk(choice)

    def _logprobs(
        self, prompt_index: int, sequence: _CompletionSequence, output: RequestOutput, is_first: bool
    ) -> CompletionLogprobs | None:
        if sequence.logprobs is None:
            return None
        logprobs = () if self._options.drop_output else output.logprobs or ()
        if is_first and self._options.echo_texts is not None:
            prompt = self._prompts[prompt_index].prompt_logprobs
            return sequence.logprobs.build_echo(self._options.prompts[prompt_index][0], prompt, logprobs)
        return sequence.logprobs.build(logprobs) if logprobs else None
