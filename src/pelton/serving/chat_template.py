"""Chat templates: messages to the text of a prompt, as `transformers.apply_chat_template` renders it.

A template is code that came with a model file. `ChatTemplate` runs it in jinja2's immutable sandbox,
which keeps it from reaching outside but not from running for ever: a server renders through
`template_process.TemplateRenderer`, which adds limits of time and memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pelton.serving.template_error import ChatTemplateError, Message

# Marks where the final message ends in the rendered text. The space tells whether the template trims.
_END_OF_MESSAGE = "\ue0f0end-of-final-message\ue0f1 "


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's tokens for training; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, **options: Any) -> str:
    # jinja2's own filter escapes for HTML, and sorts keys.
    return json.dumps(value, ensure_ascii=options.pop("ensure_ascii", False), **options)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _make_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """A compiled template. Thread-safe; `variables` such as `bos_token` are given to every rendering."""

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None) -> None:
        """Raises `ChatTemplateError` where `source` is no template."""
        self.source = source
        self.variables = dict(variables or {})
        try:
            self._template = _make_environment().from_string(source)
        except (jinja2.TemplateError, RecursionError, ValueError, OverflowError, MemoryError) as error:
            raise ChatTemplateError(f"the chat template does not compile: {error}") from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. Raises `ChatTemplateError`.

        `continue_final_message` ends the text where the last message's content ends, so that the
        model goes on with it; it excludes `add_generation_prompt`.
        """
        if continue_final_message:
            messages = _with_end_mark(messages)
        try:
            text = self._template.render(
                {
                    **self.variables,
                    **(variables or {}),
                    "messages": messages,
                    "tools": tools,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from None
        except MemoryError:
            raise ChatTemplateError("the chat template needs too much memory for these messages") from None
        except Exception as error:  # a template can fail in as many ways as a program
            raise ChatTemplateError(f"the chat template fails: {type(error).__name__}: {error}") from None
        if not continue_final_message:
            return text
        end = text.rfind(_END_OF_MESSAGE.rstrip())
        if end < 0:
            raise ChatTemplateError("the chat template does not show the final message, so it cannot be continued")
        return text[:end] if text.startswith(_END_OF_MESSAGE, end) else text[:end].rstrip()


def _with_end_mark(messages: Sequence[Message]) -> list[Message]:
    content = messages[-1].get("content") if messages else None
    if not isinstance(content, str):
        raise ChatTemplateError("continue_final_message needs a final message with text content")
    return [*messages[:-1], {**messages[-1], "content": content + _END_OF_MESSAGE}]
