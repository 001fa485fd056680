"""`ResponseBuilder`: deltas of one generation to items of a response, and to the events that tell of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from pelton.core.errors import PeltonError
from pelton.core.output import RequestOutput, TokenLogprobs, Usage
from pelton.core.request import FinishReason
from pelton.serving.errors import error_body
from pelton.serving.generation import Batch
from pelton.serving.openai.logprobs import TokenSpelling, chat_logprobs
from pelton.serving.openai.responses import TokenLogprob
from pelton.serving.openai.responses_api.conversation import seal
from pelton.serving.openai.responses_api.objects import (
    FunctionCallItem,
    IncompleteDetails,
    InputTokensDetails,
    ItemStatus,
    MessageItem,
    OutputItem,
    OutputText,
    OutputTokensDetails,
    ReasoningItem,
    ReasoningText,
    ResponseError,
    ResponseObject,
    ResponseUsage,
)
from pelton.serving.parsing.answer import AnswerPlan
from pelton.serving.parsing.events import AnswerEvent, ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallStart
from pelton.serving.sse import SSE_DONE

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    plan: AnswerPlan
    spelling: TokenSpelling
    logprobs: int | None = None  # how many of the most likely beside each token
    seals_reasoning: bool = False
    emits: bool = True  # False: nobody reads the events


class ResponseBuilder:
    """Also the encoder of its stream (`serving.sse.ChunkEncoder`). `response` always tells how far it is."""

    def __init__(self, response: ResponseObject, options: BuildOptions) -> None:
        self.response = response
        self.is_finished = False
        self._options = options
        self._parser = options.plan.make_parser()
        self._events: list[bytes] = []
        self._sequence_number = 0
        self._open: OutputItem | None = None
        self._parts: list[str] = []
        self._frame = (b"", b"")  # around the sequence number of a delta of the open item
        self._logprobs: list[TokenLogprob] = []  # of the open message
        self._new_logprobs: list[TokenLogprobs] = []  # of tokens whose text is held back
        self._last_status: ItemStatus = "completed"  # of an item that ends now
        self._finish_reason: FinishReason | None = None
        self._usage: Usage | None = None

    # -- the stream's encoder -----------------------------------------------------------------------------

    def first(self) -> bytes:
        return b"".join(self.start())

    def encode(self, batch: Batch) -> bytes:
        return b"".join(self.add(batch))

    def last(self) -> bytes:
        return b"".join(self.end()) + SSE_DONE

    def fail(self, error: PeltonError) -> bytes:
        return b"".join(self.fail_events(error))

    # -- events, one by one -------------------------------------------------------------------------------

    def start(self) -> list[bytes]:
        self._event("response.created", response=self.response)
        self._event(f"response.{self.response.status}", response=self.response)
        return self._take()

    def add(self, batch: Batch) -> list[bytes]:
        if self.response.status == "queued":
            self.response.status = "in_progress"
            self._event("response.in_progress", response=self.response)
        for _, outputs in batch:
            for output in outputs:
                self._add_output(output)
        return self._take()

    def settle(self) -> None:
        """Every delta is there: the response's last state, before `end` tells of it."""
        response = self.response
        if self._finish_reason is FinishReason.LENGTH:
            response.status, response.incomplete_details = "incomplete", IncompleteDetails()
        else:
            response.status, response.completed_at = "completed", int(time.time())

    def settle_cancelled(self) -> None:
        self._close("incomplete")
        self.response.status = "cancelled"

    def settle_failed(self, error: PeltonError) -> None:
        self._close("incomplete")
        body = error_body(error)
        self.response.status = "failed"
        self.response.error = ResponseError(code=body.code or "server_error", message=body.message)

    def end(self) -> list[bytes]:
        self._event(f"response.{self.response.status}", response=self.response)
        return self._take()

    def fail_events(self, error: PeltonError) -> list[bytes]:
        self.settle_failed(error)
        body = error_body(error)
        self._event("error", code=body.code, message=body.message, param=body.param)
        return self.end()

    # -- deltas to items ----------------------------------------------------------------------------------

    def _add_output(self, output: RequestOutput) -> None:
        if self._options.logprobs is not None and output.logprobs:
            self._new_logprobs += output.logprobs
        for event in self._parser.push(output.text, output.token_ids):
            self._add_event(event)
        if output.finish_reason is None:
            return
        if output.finish_reason is FinishReason.LENGTH:
            self._last_status = "incomplete"
        for event in self._parser.finish():
            self._add_event(event)
        self.is_finished = True
        self._finish_reason = output.finish_reason
        if not self.response.output:
            self._open_message()
        self._close(self._last_status)
        if output.usage is not None:
            self._set_usage(output.usage)

    def _add_event(self, event: AnswerEvent) -> None:
        if isinstance(event, ContentDelta):
            if not isinstance(self._open, MessageItem):
                self._open_message()
            self._delta(event.text)
        elif isinstance(event, ReasoningDelta):
            if not isinstance(self._open, ReasoningItem):
                self._open_reasoning()
            self._delta(event.text)
        elif isinstance(event, ToolCallStart):
            self._close("completed")
            item = FunctionCallItem(id=self._item_id("fc"), call_id=event.call_id, name=event.name)
            self._open_item(item, "response.function_call_arguments.delta", b"")
        elif isinstance(event, ArgumentsDelta):
            self._delta(event.text)
        else:
            self._close(self._last_status)

    def _open_message(self) -> None:
        self._close("completed")
        item = MessageItem(id=self._item_id("msg"), content=[])
        self._open_item(item, "response.output_text.delta", b',"content_index":0')
        self._part_event("response.content_part.added", OutputText(text=""))

    def _open_reasoning(self) -> None:
        self._close("completed")
        item = ReasoningItem(id=self._item_id("rs"), content=[])
        self._open_item(item, "response.reasoning_text.delta", b',"content_index":0')
        self._part_event("response.content_part.added", ReasoningText(text=""))

    def _open_item(self, item: OutputItem, delta_type: str, content_index: bytes) -> None:
        self.response.output.append(item)
        self._open = item
        self._parts = []
        self._logprobs = []
        self._new_logprobs = self._new_logprobs if isinstance(item, MessageItem) else []
        place = f',"item_id":"{item.id}","output_index":{len(self.response.output) - 1}'.encode()
        name = delta_type.encode()
        self._frame = (
            b"event: " + name + b'\ndata: {"type":"' + name + b'","sequence_number":',
            place + content_index + b',"delta":',
        )
        self._event("response.output_item.added", output_index=len(self.response.output) - 1, item=item)

    def _delta(self, text: str) -> None:
        self._parts.append(text)
        tail = b"}\n\n"
        if isinstance(self._open, MessageItem):
            entries: Sequence[TokenLogprob] = ()
            if self._new_logprobs:
                entries = self._spell(self._new_logprobs)
                self._new_logprobs = []
                self._logprobs += entries
            tail = b',"logprobs":' + (_encode(entries) if entries else b"[]") + b"}\n\n"
        if self._options.emits:
            before, after = self._frame
            self._events.append(before + b"%d" % self._sequence_number + after + _encode(text) + tail)
            self._sequence_number += 1

    def _spell(self, logprobs: list[TokenLogprobs]) -> list[TokenLogprob]:
        return chat_logprobs(logprobs, self._options.logprobs or 0, self._options.spelling).content

    def _close(self, status: ItemStatus) -> None:
        item, text = self._open, "".join(self._parts)
        if item is None:
            return
        self._open = None
        place: dict[str, Any] = {"item_id": item.id, "output_index": len(self.response.output) - 1}
        if isinstance(item, FunctionCallItem):
            item.arguments = text
            self._event("response.function_call_arguments.done", **place, name=item.name, arguments=text)
        elif isinstance(item, MessageItem):
            part = OutputText(text=text, logprobs=self._logprobs)
            item.content = [part]
            self._event("response.output_text.done", **place, content_index=0, text=text, logprobs=part.logprobs)
            self._part_event("response.content_part.done", part, item)
        else:
            item.content = [ReasoningText(text=text)]
            if self._options.seals_reasoning:
                item.encrypted_content = seal(text)
            self._event("response.reasoning_text.done", **place, content_index=0, text=text)
            self._part_event("response.content_part.done", item.content[0], item)
        item.status = status
        self._event("response.output_item.done", output_index=place["output_index"], item=item)

    def _set_usage(self, usage: Usage) -> None:
        self.response.usage = ResponseUsage(
            input_tokens=usage.num_prompt_tokens,
            output_tokens=usage.num_output_tokens,
            total_tokens=usage.num_prompt_tokens + usage.num_output_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=usage.num_cached_tokens),
            output_tokens_details=OutputTokensDetails(reasoning_tokens=self._parser.num_reasoning_tokens),
        )

    def _item_id(self, prefix: str) -> str:
        """Ids name their response, so that an item can be found by its id alone."""
        return item_id(prefix, self.response.id, len(self.response.output))

    # -- encoding -----------------------------------------------------------------------------------------

    def _part_event(self, kind: str, part: OutputText | ReasoningText, item: OutputItem | None = None) -> None:
        item = item or self._open
        assert item is not None
        index = len(self.response.output) - 1
        self._event(kind, item_id=item.id, output_index=index, content_index=0, part=part)

    def _event(self, kind: str, **fields: Any) -> None:
        if self._options.emits:
            body = _encode({"type": kind, "sequence_number": self._sequence_number, **fields})
            self._events.append(b"event: " + kind.encode() + b"\ndata: " + body + b"\n\n")
            self._sequence_number += 1

    def _take(self) -> list[bytes]:
        events, self._events = self._events, []
        return events


def item_id(prefix: str, response_id: str, index: int) -> str:
    return f"{prefix}_{response_id.removeprefix('resp_')}{index:04x}"


def response_of_item(item_id: str) -> str | None:
    """The id of the response that made the item, if it looks like one of ours."""
    name = item_id.partition("_")[2]
    return f"resp_{name[:-4]}" if len(name) == 36 else None
