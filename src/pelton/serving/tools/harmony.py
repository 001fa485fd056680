"""gpt-oss: messages on channels, `<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>`.

Reasoning is the `analysis` channel, so one reader does both. https://cookbook.openai.com/articles/openai-harmony
"""

from __future__ import annotations

import re

from pelton.serving.parsing.answer import ReadAnswer
from pelton.serving.parsing.reader import Steps, TextReader
from pelton.serving.parsing.sink import AnswerSink
from pelton.serving.tools.format import CallSyntax, CommonCallIds, SpellMarker, ToolDefinition
from pelton.serving.tools.lark import arguments_json, lark_string

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=functions\.([\w.:-]+)")


class HarmonyFormat(CommonCallIds):
    name = "harmony"
    markers: tuple[str, ...] = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)

    def detect(self, template: str, model_name: str) -> bool:
        return CHANNEL in template and MESSAGE in template

    def reader(self, tool_names: frozenset[str], *, starts_only: bool = False) -> ReadAnswer:
        return read_harmony

    def syntax(self, spell: SpellMarker) -> CallSyntax:
        analysis = f"{spell(CHANNEL)} {lark_string('analysis')} {spell(MESSAGE)} /(?s:.*)/ {spell(END)}"
        before = f"({analysis} {spell(START)} {lark_string('assistant')})?"
        final = f"{spell(CHANNEL)} {lark_string('final')} {spell(MESSAGE)} /(?s:.*)/"

        def call(tool: ToolDefinition) -> str:
            head = f"{spell(CHANNEL)} {lark_string(f'commentary to=functions.{tool.name} ')} {spell(CONSTRAIN)}"
            return f"{head} {lark_string('json')} {spell(MESSAGE)} {arguments_json(tool)}"

        return CallSyntax(call=call, before=before, free=final)


def read_harmony(reader: TextReader, sink: AnswerSink) -> Steps[None]:
    while True:
        header: list[str] = []
        if not (yield from reader.until((MESSAGE,), header.append)):
            text = "".join(header)
            if CHANNEL not in text and not START.startswith(text[: len(START)]):
                sink.content(text)  # a model that does not keep to the format
            return
        yield from _read_message(reader, sink, "".join(header))


def _read_message(reader: TextReader, sink: AnswerSink, header: str) -> Steps[None]:
    channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
    ends = (END, CALL, RETURN, START)
    if recipient is not None:
        sink.start_call(recipient[1])
        yield from reader.until(ends, sink.arguments)
        sink.end_call()
    elif channel is not None and channel[1] == "analysis":
        sink.start_reasoning()
        if (yield from reader.until(ends, sink.reasoning)):
            sink.end_reasoning()
    else:
        yield from reader.until(ends, sink.content)
