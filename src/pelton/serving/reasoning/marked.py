"""Reasoning between two markers ahead of the answer: `<think>...</think>` and kin."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from pelton.serving.parsing.answer import ReadAnswer
from pelton.serving.parsing.reader import Steps, TextReader
from pelton.serving.parsing.sink import AnswerSink


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedFormat:
    """`thinks_always`: what comes before the closing marker is reasoning, with an opening one or without."""

    name: str
    opening: str
    closing: str
    template_texts: tuple[str, ...] = ()  # all are in the template of such a model
    thinks_always: bool = False

    @property
    def tells_tool_calls(self) -> bool:
        return False

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.opening, self.closing)

    def detect(self, template: str) -> bool:
        return bool(self.template_texts) and all(text in template for text in self.template_texts)

    def is_open(self, prompt: str) -> bool:
        text = prompt.rstrip()
        return text.endswith(self.opening) or (self.thinks_always and not text.endswith(self.closing))

    def is_over(self, prompt: str) -> bool:
        return prompt.rstrip().endswith(self.closing)

    def reader(self, *, is_open: bool) -> ReadAnswer:
        return partial(_read, markers=self.markers, is_open=is_open)


def _read(reader: TextReader, sink: AnswerSink, *, markers: tuple[str, ...], is_open: bool) -> Steps[None]:
    opening, closing = markers
    if is_open:
        sink.start_reasoning()
    reader.mark()
    yield from reader.skip_space()
    if (yield from reader.take((opening,))):
        reader.release()
        if not is_open:
            sink.start_reasoning()
    else:
        reader.rewind()
        if not is_open:
            return
    if (yield from reader.until((closing,), sink.reasoning)):
        sink.end_reasoning()
