"""gpt-oss: the `analysis` channel. Its reader is that of its tool calls, which come on channels too."""

from __future__ import annotations

from pelton.serving.parsing.answer import ReadAnswer
from pelton.serving.tools.harmony import CHANNEL, END, MESSAGE, HarmonyFormat, read_harmony


class HarmonyReasoning:
    name = "harmony"
    markers = HarmonyFormat.markers
    opening = f"{CHANNEL}analysis{MESSAGE}"
    closing = END
    tells_tool_calls = True

    def detect(self, template: str) -> bool:
        return HarmonyFormat().detect(template, "")

    def is_open(self, prompt: str) -> bool:
        return False

    def is_over(self, prompt: str) -> bool:
        return False

    def reader(self, *, is_open: bool) -> ReadAnswer:
        return read_harmony
