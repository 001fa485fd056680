"""DeepSeek V3 and R1: `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`, the arguments in a fenced block of JSON.

V3.1 leaves out `function` and the fence: `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}`.
https://huggingface.co/deepseek-ai/DeepSeek-V3 (tokenizer_config.json)
"""

from __future__ import annotations

from pelton.serving.parsing.answer import ReadAnswer
from pelton.serving.parsing.reader import Steps, TextReader
from pelton.serving.parsing.sink import AnswerSink
from pelton.serving.tools.format import CallSyntax, CommonCallIds, SpellMarker, ToolDefinition
from pelton.serving.tools.json_calls import pass_arguments
from pelton.serving.tools.lark import arguments_json, lark_string

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
_KIND = "function"


class DeepSeekFormat(CommonCallIds):
    name = "deepseek_v3"
    markers: tuple[str, ...] = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)

    def detect(self, template: str, model_name: str) -> bool:
        return CALLS_BEGIN in template and "```json" in template

    def reader(self, tool_names: frozenset[str], *, starts_only: bool = False) -> ReadAnswer:
        return _read

    def syntax(self, spell: SpellMarker) -> CallSyntax:
        def call(tool: ToolDefinition) -> str:
            head, tail = lark_string(f"{tool.name}\n```json\n"), lark_string("\n```")
            begin = f"{spell(CALL_BEGIN)} {lark_string(_KIND)} {spell(SEPARATOR)}"
            return f"{begin} {head} {arguments_json(tool)} {tail} {spell(CALL_END)}"

        return CallSyntax(call=call, trigger=CALLS_BEGIN, separator=lark_string("\n"), closing=spell(CALLS_END))


class DeepSeek31Format(DeepSeekFormat):
    name = "deepseek_v31"

    def detect(self, template: str, model_name: str) -> bool:
        return CALLS_BEGIN in template and "```json" not in template

    def syntax(self, spell: SpellMarker) -> CallSyntax:
        def call(tool: ToolDefinition) -> str:
            head = f"{spell(CALL_BEGIN)} {lark_string(tool.name)} {spell(SEPARATOR)}"
            return f"{head} {arguments_json(tool)} {spell(CALL_END)}"

        return CallSyntax(call=call, trigger=CALLS_BEGIN, separator="", closing=spell(CALLS_END))


def _read(reader: TextReader, sink: AnswerSink) -> Steps[None]:
    """Calls are told by their own markers: those around all of them may be missing."""
    while (marker := (yield from reader.until((CALL_BEGIN, CALLS_BEGIN, CALLS_END), sink.content))) is not None:
        if marker == CALL_BEGIN and not (yield from _read_call(reader, sink)):
            sink.content(CALL_BEGIN)


def _read_call(reader: TextReader, sink: AnswerSink) -> Steps[bool]:
    reader.mark()
    head: list[str] = []
    if not (yield from reader.until((SEPARATOR,), head.append)):
        reader.rewind()
        return False
    name = "".join(head).strip()
    if name == _KIND:
        line: list[str] = []
        if not (yield from reader.until(("\n",), line.append)):
            reader.rewind()
            return False
        name = "".join(line).strip()
    yield from reader.skip_space()
    yield from reader.take(("```json",))
    if not name or (yield from reader.skip_space()) != "{":
        reader.rewind()
        return False
    reader.release()
    sink.start_call(name)
    yield from pass_arguments(reader, sink)
    for closing in ("```", CALL_END):
        yield from reader.skip_space()
        yield from reader.take((closing,))
    return True
