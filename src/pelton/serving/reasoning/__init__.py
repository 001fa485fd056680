"""Reasoning: the formats in which models mark it. Adding one is a row here, or a file and a row."""

from __future__ import annotations

from pelton.serving.reasoning.format import ReasoningFormat
from pelton.serving.reasoning.harmony import HarmonyReasoning
from pelton.serving.reasoning.marked import MarkedFormat

# The first that knows a template is taken.
_ROWS: tuple[ReasoningFormat, ...] = (
    HarmonyReasoning(),
    MarkedFormat(
        name="deepseek_r1",
        opening="<think>",
        closing="</think>",
        template_texts=("</think>", "<｜Assistant｜>"),
        thinks_always=True,
    ),
    MarkedFormat(name="qwen3", opening="<think>", closing="</think>", template_texts=("</think>",)),
    MarkedFormat(name="mistral", opening="[THINK]", closing="[/THINK]", template_texts=("[THINK]",)),
    MarkedFormat(name="seed_oss", opening="<seed:think>", closing="</seed:think>", template_texts=("<seed:think>",)),
)
REASONING_FORMATS: dict[str, ReasoningFormat] = {row.name: row for row in _ROWS}
# Other names of the same, as vLLM has them.
REASONING_ALIASES = {"openai_gptoss": "harmony", "gpt_oss": "harmony", "glm45": "qwen3", "deepseek_v3": "qwen3"}
REASONING_NAMES = (*REASONING_FORMATS, *REASONING_ALIASES)


def reasoning_format(name: str) -> ReasoningFormat:
    """Raises `KeyError`."""
    return REASONING_FORMATS[REASONING_ALIASES.get(name, name)]


def detect_reasoning_format(template: str) -> ReasoningFormat | None:
    """The format of the model that this chat template belongs to; None: it does not reason."""
    return next((row for row in _ROWS if row.detect(template)), None)
