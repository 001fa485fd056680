"""Chat templates: what `transformers` renders, and the limits of a hostile one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from pelton.serving.chat_template import ChatTemplate, ChatTemplateError
from pelton.serving.template_process import TemplateRenderer
from tests.serving.make import TEMPLATE, running_server

# Shaped like Gemma's: BOS, a turn per message, the assistant called "model", trimmed contents, an error.
TURNS = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set offset = 1 %}{% set prefix = messages[0]['content'] + '\\n\\n' %}
{%- else %}
    {%- set offset = 0 %}{% set prefix = '' %}
{%- endif %}
{%- for message in messages[offset:] %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{ '<turn>' + role + '\\n' + (prefix if loop.first else '') + message['content'] | trim + '<end>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{ '<turn>model\\n' }}
{%- endif %}
"""
# Everything else that templates of this field use.
FEATURES = """{%- set state = namespace(count=0) -%}
{% for message in messages if message.role != 'system' %}
    {% set state.count = state.count + 1 %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    {% generation %}[{{ message.content | upper | replace('A', 'é') }}]{% endgeneration %}
    {% if state.count >= 3 %}{% break %}{% endif %}
{% endfor %}
{{ {'b': 1, 'a': ['<ü>', none, true]} | tojson }} {{ {'z': 1, 'a': 2} | tojson(indent=2) }}
{{ tools is none }} {{ documents is none }} {{ enable_thinking | default('unset') }} {{ range(3) | list }}
{% macro show(x) %}<{{ x }}>{% endmacro %}{{ show(eos_token) }} {{ messages | length }} {{ 'x' in 'xyz' }}
{{ strftime_now('%Y') | length }} {{ messages[0].missing is defined }} {{ dict(a=1).items() | list }}
"""
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello"}],
    [{"role": "system", "content": "be short"}, {"role": "user", "content": "a\n b "}],
    [
        {"role": "system", "content": "du bist <|im_end|> nett 😀"},
        {"role": "user", "content": " eins "},
        {"role": "assistant", "content": "zwei\n"},
        {"role": "user", "content": "drei"},
    ],
]
VARIABLES = {"bos_token": "<bos>", "eos_token": "<eos>"}


def reference(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template([messages], chat_template=template, **VARIABLES, **options)
    return str(rendered[0])


@pytest.fixture(scope="module")
def bounded() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer(FEATURES, VARIABLES)
    yield renderer
    renderer.close()


@pytest.mark.torch
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("template", [TURNS, FEATURES, TEMPLATE], ids=["turns", "features", "simple"])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_equals_transformers(template: str, messages: list[dict[str, Any]], add_generation_prompt: bool) -> None:
    expected = reference(template, messages, add_generation_prompt=add_generation_prompt)
    own = ChatTemplate(template, VARIABLES).render(messages, add_generation_prompt=add_generation_prompt)
    assert own == expected


@pytest.mark.torch
@pytest.mark.parametrize("template", [TURNS, TEMPLATE], ids=["trims", "keeps"])
@pytest.mark.parametrize("content", ["half a", "half a ", "", "half a\n"])
def test_continuing_equals_transformers(template: str, content: str) -> None:
    messages = [*CONVERSATIONS[0], {"role": "assistant", "content": content}]
    own = ChatTemplate(template, VARIABLES).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert own == reference(template, messages, continue_final_message=True)


@pytest.mark.model
def test_default_model_equals_transformers(default_model_path: Path) -> None:
    from pelton.weights.model_files import open_model

    template = open_model(default_model_path).chat_template
    assert template is not None
    call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"x": "<é>", "y": [1, None]}}}
    with_tools = [
        *CONVERSATIONS[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "tool", "content": "43", "tool_call_id": "1"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    own = ChatTemplate(template, VARIABLES)
    for messages in (*CONVERSATIONS, with_tools):
        for options in ({}, {"tools": tools}, {"add_generation_prompt": True}):
            assert own.render(messages, **({"add_generation_prompt": False} | options)) == reference(
                template, messages, **options
            )


def test_the_helper_renders_the_same(bounded: TemplateRenderer) -> None:
    direct = ChatTemplate(FEATURES, VARIABLES)
    for messages in CONVERSATIONS:
        assert bounded.render(messages, variables={"enable_thinking": False}) == direct.render(
            messages, variables={"enable_thinking": False}
        )


def test_the_helper_serves_many_threads(bounded: TemplateRenderer) -> None:
    def render(number: int) -> bool:
        return f"[N{number}]" in bounded.render([{"role": "user", "content": f"n{number}"}])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(render, range(200)))


HOSTILE = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "string": "{{ 'a' * 10 ** 11 }}",
    "power": "{% set n = messages | length + 8 %}{{ n ** (n ** n) }}",
    "constant": "{{ 9 ** (9 ** 9) }}",
    "format": "{{ '%2000000000d' % 1 }}",
    "list": "{% set ns = namespace(x=[0]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_costs_its_own_request(name: str) -> None:
    renderer = TemplateRenderer(HOSTILE[name], time_limit_s=0.3, memory_limit_bytes=1 << 28)
    try:
        for _ in range(2):
            started_s = time.monotonic()
            with pytest.raises(ChatTemplateError):
                renderer.render(CONVERSATIONS[0])
            assert time.monotonic() - started_s < 10  # not for ever; no statement on speed
    finally:
        renderer.close()


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update(a=1) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{{ raise_exception('not like this') }}", "not like this"),
        ("{{ missing.attribute }}", "undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for %}", "compile"),
        ("{{ messages[0].content.no() }}", "no attribute"),
    ],
)
def test_forbidden_and_failing_templates(template: str, problem: str) -> None:
    with pytest.raises(ChatTemplateError, match=problem) as error:
        ChatTemplate(template).render(CONVERSATIONS[0])
    assert error.value.code == "chat_template_error"


def test_a_killed_helper_is_replaced(bounded: TemplateRenderer) -> None:
    bounded.render(CONVERSATIONS[0])
    helper = bounded._helpers._idle.get()
    assert helper is not None
    os.kill(helper._process.pid, 9)
    bounded._helpers._idle.put(helper)
    with pytest.raises(ChatTemplateError):
        bounded.render(CONVERSATIONS[0])
    assert bounded.render(CONVERSATIONS[0])


def test_helpers_end_with_their_owner() -> None:
    renderer = TemplateRenderer(TEMPLATE)
    renderer.render(CONVERSATIONS[0])
    helper = renderer._helpers._idle.queue[-1]
    assert helper is not None
    renderer.close()
    assert helper._process.poll() is not None


@pytest.mark.parametrize("value", [10**30, "\ud800"])
def test_values_that_no_helper_can_take(bounded: TemplateRenderer, value: Any) -> None:
    with pytest.raises(ChatTemplateError):
        bounded.render(CONVERSATIONS[0], variables={"enable_thinking": value})
    assert bounded.render(CONVERSATIONS[0])


def test_over_http_it_is_a_400_and_the_server_goes_on() -> None:
    template = "{% if messages[0].content == 'bad' %}" + HOSTILE["loop"] + "{% endif %}" + TEMPLATE
    with running_server(chat_template=template) as server, httpx2.Client(base_url=server.url, timeout=30) as http:
        bad = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "bad"}]})
        assert bad.status_code == 400
        assert bad.json()["error"]["code"] == "chat_template_error"
        assert bad.json()["error"]["param"] == "messages"
        good = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "good"}]})
        assert good.status_code == 200
        variables = {"messages": [{"role": "user", "content": "good"}], "chat_template_kwargs": {"messages": []}}
        assert http.post("/v1/chat/completions", json=variables).json()["usage"]["prompt_tokens"] > 10
