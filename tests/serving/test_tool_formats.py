"""Every tool-call format: what it reads, that no cut of the stream changes it, and that it reads what it enforces."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pelton.serving.parsing.answer import AnswerPlan, ParsedAnswer, parse_answer
from pelton.serving.tools import TOOL_CALL_FORMATS, detect_tool_call_format, tool_call_format
from pelton.serving.tools.format import ToolDefinition
from pelton.serving.tools.lark import calls_grammar, free_grammar, lark_string, thought_rule

WEATHER = ToolDefinition(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "place": {"$ref": "#/$defs/place"},
        },
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"place": {"type": "object", "properties": {"at": {"type": "array", "items": {"type": "number"}}}}},
    },
)
ADD = ToolDefinition(
    name="math.add",
    parameters={"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}, "required": ["a"]},
)
TOOLS = (WEATHER, ADD)
NAMES = frozenset(tool.name for tool in TOOLS)
OSLO = ("get_weather", {"city": "Oslo"})
SUM = ("math.add", {"a": 1, "b": -2.5})
HARD = ("get_weather", {"city": 'a "b" \\ } ] </tool_call> <|x|> \n é😀', "place": {"at": [1, 2], "x": {"y": []}}})

# (format, what a model writes, the content, the calls)
CASES: list[tuple[str, str, str | None, list[Any]]] = []


def case(name: str, text: str, content: str | None, *calls: Any) -> None:
    CASES.append((name, text, content, list(calls)))


def obj(call: Any, key: str = "arguments") -> str:
    return json.dumps({"name": call[0], key: call[1]}, ensure_ascii=False)


for _name in ("hermes", "qwen_coder"):
    case(_name, f"<tool_call>\n{obj(OSLO)}\n</tool_call>", None, OSLO)
    case(
        _name,
        f"Let me see.\n<tool_call>\n{obj(OSLO)}\n</tool_call>\n<tool_call>{obj(SUM)}</tool_call>",
        "Let me see.",
        OSLO,
        SUM,
    )
    case(_name, f"<tool_call>{obj(HARD)}</tool_call> done", "done", HARD)
    case(_name, "<tool_call>no call</tool_call> here", "<tool_call>no call</tool_call> here")
    case(_name, '<tool_call>{"arguments": {"city": "Oslo"}, "name": "get_weather"}</tool_call>', None, OSLO)
    case(_name, f'<tool_call>{{"name": "get_weather", "arguments": {json.dumps(json.dumps(OSLO[1]))}}}', None, OSLO)
    case(_name, '<tool_call>{"name": "python", "arguments": "print()"}</tool_call>', None, ("python", "print()"))
    case(_name, '<tool_call>{"name": "unknown"}</tool_call>', None, ("unknown", {}))
    case(_name, "a < b <tool", "a < b <tool")
    case(_name, '  {"a": 1}\n', '  {"a": 1}\n')
case("qwen_coder", obj(OSLO), None, OSLO)
case("qwen_coder", f"{obj(OSLO)}\n{obj(SUM)}", None, OSLO, SUM)
case("qwen_coder", f"[{obj(OSLO)}, {obj(SUM)}]", None, OSLO, SUM)
case("qwen_coder", f"Here:\n```json\n{obj(OSLO)}\n```\nand then", "Here:\nand then", OSLO)
case("qwen_coder", f"<tools>\n{obj(OSLO)}\n</tools>", None, OSLO)
case("qwen_coder", f"Sure.\n{obj(OSLO)}", "Sure.", OSLO)
case("qwen_coder", '```json\n{"name": "Ann"}\n```', '```json\n{"name": "Ann"}\n```')
case("qwen_coder", '{"name": "get_weather", "description": "x"}', '{"name": "get_weather", "description": "x"}')
case("llama3_json", obj(OSLO, "parameters"), None, OSLO)
case("llama3_json", f"<|python_tag|>{obj(OSLO, 'parameters')}; {obj(SUM, 'parameters')}", None, OSLO, SUM)
case("llama3_json", '{"name": "Ann", "parameters": {}}', '{"name": "Ann", "parameters": {}}')
case("json", f"[{obj(OSLO)}, {obj(HARD)}]", None, OSLO, HARD)
case("json", "[1, 2]", "[1, 2]")
for _name in ("mistral", "mistral_v11"):
    case(_name, f"[TOOL_CALLS][{obj(OSLO)}, {obj(SUM)}]", None, OSLO, SUM)
    case(
        _name,
        f"Yes.[TOOL_CALLS]get_weather[ARGS]{json.dumps(HARD[1])}[TOOL_CALLS]math.add[CALL_ID]ab12[ARGS]{json.dumps(SUM[1])}",
        "Yes.",
        HARD,
        SUM,
    )
    case(_name, "[TOOL_CALLS] or not", "[TOOL_CALLS] or not")
_V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
_V31 = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
for _name in ("deepseek_v3", "deepseek_v31"):
    for _one in (_V3, _V31):
        _calls = "\n".join(_one.format(name, json.dumps(args)) for name, args in (OSLO, HARD))
        case(_name, f"Ok.<｜tool▁calls▁begin｜>{_calls}<｜tool▁calls▁end｜>", "Ok.", OSLO, HARD)
    case(_name, "<｜tool▁call▁begin｜>what", "<｜tool▁call▁begin｜>what")
for _name, (_open, _close, _quote) in {
    "functiongemma": ("<start_function_call>", "<end_function_call>", "<escape>"),
    "gemma4": ("<|tool_call>", "<tool_call|>", '<|"|>'),
}.items():
    _text = f'{_open}call:get_weather{{city:{_quote}O"slo\\{_quote},place:{{at:[1, 2.5],x:{_quote}{_quote}}}}}{_close}'
    _parsed = ("get_weather", {"city": 'O"slo\\', "place": {"at": [1, 2.5], "x": ""}})
    case(_name, f"Hm. {_text}{_text}", "Hm.", _parsed, _parsed)
    case(_name, f"{_open}call:math.add{{a:1,b:-2.5}}{_close}", None, SUM)
    case(_name, f"{_open}call:get_weather{json.dumps(HARD[1])}{_close}", None, HARD)
    case(_name, f"{_open}nothing", f"{_open}nothing")
case("pythonic", '[get_weather(city="Oslo"), math.add(a=1, b=-2.5)]', None, OSLO, SUM)
case(
    "pythonic",
    "<|python_start|>[get_weather(city='it\\'s, (so)', place={'at': [1, 2], \"x\": None, 'y': True})]<|python_end|>",
    None,
    ("get_weather", {"city": "it's, (so)", "place": {"at": [1, 2], "x": None, "y": True}}),
)
case("pythonic", f"[get_weather(**{json.dumps(HARD[1])})]", None, HARD)
case("pythonic", "[math.add()]", None, ("math.add", {}))
case("pythonic", "[print(x)] is Python", "[print(x)] is Python")
_CALL = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}"
case("harmony", _CALL.format(OSLO[0], json.dumps(OSLO[1])), None, OSLO)
case(
    "harmony",
    "<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant" + _CALL.format(HARD[0], json.dumps(HARD[1])),
    "Wait.",
    HARD,
)
case("harmony", "<|channel|>final<|message|>Hi there.\n", "Hi there.\n")
case("harmony", "Hi there.", "Hi there.")


def plan(name: str, **options: Any) -> AnswerPlan:
    return AnswerPlan(answer=tool_call_format(name).reader(NAMES), **options)


def parse_pieces(answer_plan: AnswerPlan, pieces: list[str]) -> ParsedAnswer:
    parser, answer = answer_plan.make_parser(), ParsedAnswer()
    for piece in pieces:
        answer.add(parser.push(piece))
    answer.add(parser.finish())
    return answer


def calls_of(answer: ParsedAnswer) -> list[Any]:
    return [(call.name, call.arguments) for call in answer.tool_calls]


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_reads(name: str, text: str, content: str | None, calls: list[Any]) -> None:
    answer = parse_answer(plan(name), text)
    assert answer.content == content
    assert [(call.name, json.loads(call.arguments)) for call in answer.tool_calls] == calls


def test_every_format_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(TOOL_CALL_FORMATS)


@pytest.mark.parametrize(("name", "text"), [case[:2] for case in CASES])
def test_no_cut_changes_what_is_read(name: str, text: str) -> None:
    """Each single cut, every character alone, and every end that the text may have."""
    whole = parse_answer(plan(name), text)
    for cut in range(len(text) + 1):
        answer = parse_pieces(plan(name), [text[:cut], text[cut:]])
        assert (answer.content, calls_of(answer)) == (whole.content, calls_of(whole))
        start = text[:cut]
        broken, streamed = parse_answer(plan(name), start), parse_pieces(plan(name), list(start))
        assert (streamed.content, calls_of(streamed)) == (broken.content, calls_of(broken))


_WORDS = sorted({piece for _, text, _, _ in CASES for piece in (text, text[: len(text) // 2], text[len(text) // 2 :])})
_MARKERS = sorted({marker for row in TOOL_CALL_FORMATS.values() for marker in row.markers})
_PIECES = st.sampled_from(
    [*_MARKERS, *_WORDS, '"', "{", "}", "[", "]", ",", ":", "\\", "\n", " ", "call:", "name", "=("]
)


@pytest.mark.parametrize("name", TOOL_CALL_FORMATS)
@given(parts=st.lists(_PIECES | st.text(max_size=4), max_size=8), data=st.data())
@settings(max_examples=100, deadline=None)
def test_no_split_of_any_text_changes_what_is_read(name: str, parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole, streamed = parse_answer(plan(name), text), parse_pieces(plan(name), pieces)
    assert (streamed.content, calls_of(streamed)) == (whole.content, calls_of(whole))


# Not "harmony", which says nothing ahead of its first header.
@pytest.mark.parametrize("name", [name for name in TOOL_CALL_FORMATS if name != "harmony"])
def test_text_goes_out_as_soon_as_it_cannot_be_markup(name: str) -> None:
    parser = plan(name).make_parser()
    assert [event.text for event in parser.push("Hello")] == ["Hello"]  # type: ignore[union-attr]
    assert [event.text for event in parser.push(" you")] == [" you"]  # type: ignore[union-attr]


def test_one_call_where_no_more_are_wanted() -> None:
    text = f"<tool_call>{obj(OSLO)}</tool_call><tool_call>{obj(SUM)}</tool_call>"
    assert calls_of(parse_answer(plan("hermes", max_calls=1), text)) == [("get_weather", '{"city": "Oslo"}')]


class Bytes:
    """A vocabulary of bytes, for grammars without a model."""

    eos_token_id, bos_token_id = 256, None
    unk_token_id = None
    tokens = [bytes([i]) for i in range(256)] + [b"<eos>"]
    special_token_ids = [256]  # noqa: RUF012

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


TOKENIZER = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))


def accepts(grammar: str, text: str) -> bool:
    matcher = llguidance.LLMatcher(TOKENIZER, llguidance.grammar_from("lark", grammar))
    assert not matcher.is_error(), matcher.get_error()
    data = list(text.encode())
    return matcher.validate_tokens(data) == len(data) and matcher.consume_tokens(data) and matcher.is_accepting()


def sample(grammar: str, seed: int, max_tokens: int = 600) -> str:
    """A text that the grammar allows, at random but for an end as soon as there may be one."""
    source = random.Random(seed)
    matcher = llguidance.LLMatcher(TOKENIZER, llguidance.grammar_from("lark", grammar))
    data = bytearray()
    for _ in range(max_tokens):
        if matcher.is_accepting() and source.random() < 0.7:
            break
        mask = matcher.compute_bitmask()
        allowed = [i for i in range(256) if mask[i >> 3] >> (i & 7) & 1]
        if not allowed:
            break
        closing = [i for i in allowed if chr(i) in '"}]']
        choice = source.choice(closing if closing and source.random() < 0.5 else allowed)
        data.append(choice)
        assert matcher.consume_token(choice), matcher.get_error()
    return data.decode(errors="ignore") if matcher.is_accepting() else ""


@pytest.mark.parametrize("name", TOOL_CALL_FORMATS)
@pytest.mark.parametrize("is_parallel", [True, False])
@pytest.mark.parametrize("is_required", [True, False])
def test_reads_what_it_enforces(name: str, is_parallel: bool, is_required: bool) -> None:
    row = tool_call_format(name)
    syntax = row.syntax(lark_string)
    if is_required:
        syntax = syntax.required or syntax
    grammar = calls_grammar(syntax, TOOLS, lark_string, is_parallel=is_parallel)
    schemas = {tool.name: tool.parameters for tool in TOOLS}
    num_texts = 0
    for seed in range(25):
        text = sample(grammar, seed)
        if not text:
            continue
        num_texts += 1
        answer = parse_answer(plan(name), text)
        assert answer.content is None, text
        assert answer.tool_calls, text
        held = AnswerPlan(make_call_id=row.make_call_id, answer=row.reader(NAMES, starts_only=True))
        assert calls_of(parse_answer(held, text)) == calls_of(answer), text
        assert is_parallel or len(answer.tool_calls) == 1
        for call in answer.tool_calls:
            jsonschema.validate(json.loads(call.arguments), schemas[call.name])
    assert num_texts >= 5


@pytest.mark.parametrize("name", TOOL_CALL_FORMATS)
def test_strict_tools_leave_the_rest_free(name: str) -> None:
    """Any text, and text before calls where a trigger tells them; but no call that does not fit its schema."""
    row = tool_call_format(name)
    syntax = row.syntax(lark_string)
    grammar = free_grammar(syntax, TOOLS, lark_string, is_parallel=True)
    head = "<|channel|>final<|message|>" if name == "harmony" else ""
    assert accepts(grammar, f"{head}Just a text.\n\n1 < 2 {{x}}")
    forced = calls_grammar(syntax, TOOLS, lark_string, is_parallel=True)
    calls = next(text for seed in range(99) if (text := sample(forced, seed)))
    assert accepts(grammar, calls)
    if syntax.trigger:
        assert accepts(grammar, f"Let me see.\n{calls}")
        assert not accepts(grammar, f"Let me see. {syntax.trigger} no call")
    renamed = calls.replace("get_weather", "get_leather").replace("math.add", "path.add")
    assert not accepts(grammar, renamed)


# Not "harmony", which has reasoning of its own.
@pytest.mark.parametrize("name", [name for name in TOOL_CALL_FORMATS if name != "harmony"])
@pytest.mark.parametrize("is_open", [True, False])
def test_reasoning_goes_ahead_of_calls(name: str, is_open: bool) -> None:
    row = tool_call_format(name)
    thought = thought_rule("<think>", "</think>", lark_string, is_open=is_open)
    grammar = calls_grammar(row.syntax(lark_string), TOOLS, lark_string, is_parallel=True, thought=thought)
    plain = calls_grammar(row.syntax(lark_string), TOOLS, lark_string, is_parallel=True)
    calls = next(text for seed in range(99) if (text := sample(plain, seed)))
    opening = "" if is_open else "<think>"
    assert accepts(grammar, f"{opening}\nHm, a < b.\n</think>\n\n{calls}")
    assert accepts(grammar, calls) != is_open
    assert not accepts(grammar, f"{opening}Hm.</think>\nNo calls.")


TEMPLATES = {
    "hermes": '{{- \'\\n<tool_call>\\n{"name": "\' }}',
    "mistral": "{{ '[TOOL_CALLS] [' }}",
    "mistral_v11": "{{ '[TOOL_CALLS]' + name + '[ARGS]' }}",
    "deepseek_v3": "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + '```json'",
    "deepseek_v31": "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'",
    "llama3_json": '<|start_header_id|>{{ \'{"name": "\' }}"parameters": ',
    "harmony": "<|channel|>analysis<|message|>",
    "functiongemma": "<start_function_call>",
    "gemma4": "<|tool_call>call:",
    "pythonic": "[func_name1(params_name1=params_value1)]",
    "json": "{{ message.content }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_tells_the_format(name: str) -> None:
    assert detect_tool_call_format(TEMPLATES[name], "a-model").name == name


def test_the_coder_is_told_by_its_name() -> None:
    assert detect_tool_call_format(TEMPLATES["hermes"], "Qwen2.5-Coder-0.5B").name == "qwen_coder"


def test_enforced_calls_have_no_parameters_that_are_not_listed() -> None:
    grammar = calls_grammar(tool_call_format("json").syntax(lark_string), TOOLS, lark_string, is_parallel=True)
    assert accepts(grammar, f"[{obj(('math.add', {'a': 1, 'b': 2}))}, {obj(OSLO)}]")
    assert not accepts(grammar, f"[{obj(('math.add', {'a': 1, 'c': 2}))}]")
