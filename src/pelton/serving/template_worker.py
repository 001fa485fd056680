"""The helper process that renders chat templates (`helper_worker.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from pelton.serving.helper_worker import run_helper
from pelton.serving.template_error import ChatTemplateError


class TemplateSource(msgspec.Struct, array_like=True):
    """The setup."""

    source: str
    variables: dict[str, Any]
    max_output_bytes: int


class RenderCall(msgspec.Struct, array_like=True):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    add_generation_prompt: bool
    continue_final_message: bool
    variables: dict[str, Any]


class RenderAnswer(msgspec.Struct, array_like=True):
    text: str | None
    problem: str | None = None


def make_answerer(setup_frame: bytes) -> Callable[[bytes], bytes]:
    # Not above: the server reads this module's frames and has no use for jinja2.
    from pelton.serving.chat_template import ChatTemplate

    setup = msgspec.msgpack.decode(setup_frame, type=TemplateSource)
    calls = msgspec.msgpack.Decoder(RenderCall)
    template: ChatTemplate | None = None

    def answer(frame: bytes) -> bytes:
        nonlocal template
        try:
            # Compiled within the time limit too.
            template = template or ChatTemplate(setup.source, setup.variables)
            call = calls.decode(frame)
            text = template.render(
                call.messages,
                tools=call.tools,
                add_generation_prompt=call.add_generation_prompt,
                continue_final_message=call.continue_final_message,
                variables=call.variables,
            )
        except ChatTemplateError as error:
            return msgspec.msgpack.encode(RenderAnswer(None, str(error)))
        data = msgspec.msgpack.encode(RenderAnswer(text))
        if len(data) > setup.max_output_bytes:
            problem = f"the prompt is longer than {setup.max_output_bytes} bytes once the chat template is applied"
            return msgspec.msgpack.encode(RenderAnswer(None, problem))
        return data

    return answer


if __name__ == "__main__":
    run_helper(make_answerer)
