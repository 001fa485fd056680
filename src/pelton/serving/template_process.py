"""Bounded rendering: a chat template runs in a helper process that can be ended (`helper_process.py`)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from pelton.serving.helper_process import MAX_ANSWER_BYTES, HelperLimitError, HelperPool, HelperSpec
from pelton.serving.template_error import ChatTemplateError, Message
from pelton.serving.template_worker import RenderAnswer, RenderCall, TemplateSource

TIME_LIMIT_S = 2.0
MEMORY_LIMIT_BYTES = 1 << 30
NUM_PROCESSES = 2


class TemplateRenderer:
    """`ChatTemplate.render` within limits. Thread-safe; up to `num_processes` renderings at a time."""

    def __init__(
        self,
        source: str,
        variables: Mapping[str, Any] | None = None,
        *,
        time_limit_s: float = TIME_LIMIT_S,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
        num_processes: int = NUM_PROCESSES,
    ) -> None:
        self.source = source
        setup = msgspec.msgpack.encode(TemplateSource(source, dict(variables or {}), MAX_ANSWER_BYTES))
        self._helpers = HelperPool(
            HelperSpec(
                module="pelton.serving.template_worker",
                setup=lambda: setup,
                work="chat template",
                time_limit_s=time_limit_s,
                memory_limit_bytes=memory_limit_bytes,
                num_processes=num_processes,
            )
        )

    def start(self) -> None:
        """Start a helper ahead of the first rendering, and have it compile the template.

        Raises `ChatTemplateError` where the template does not compile; what it says to a
        conversation of no messages does not matter.
        """
        with contextlib.suppress(ChatTemplateError):
            self.render([])

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. Raises `ChatTemplateError`, also where a limit is passed."""
        call = RenderCall(
            [dict(message) for message in messages],
            [dict(tool) for tool in tools] if tools is not None else None,
            add_generation_prompt,
            continue_final_message,
            dict(variables or {}),
        )
        try:
            frame = msgspec.msgpack.encode(call)
        except (OverflowError, RecursionError, UnicodeEncodeError) as error:
            raise ChatTemplateError(f"the messages cannot be handed to the chat template: {error}") from None
        try:
            answer = msgspec.msgpack.decode(self._helpers.call(frame), type=RenderAnswer)
        except HelperLimitError:
            raise ChatTemplateError(
                f"the chat template took more than {self._helpers.spec.time_limit_s:g} s or too much memory for these "
                "messages"
            ) from None
        if answer.text is None:
            raise ChatTemplateError(answer.problem or "the chat template fails")
        return answer.text

    def close(self) -> None:
        """End the helpers; renderings in progress fail."""
        self._helpers.close()
