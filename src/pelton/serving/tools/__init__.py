"""Tool calls: the formats in which models write them. Adding one is a file, a row here and a row in the tests."""

from __future__ import annotations

from pelton.serving.tools.deepseek import DeepSeek31Format, DeepSeekFormat
from pelton.serving.tools.format import ToolCallFormat
from pelton.serving.tools.gemma import FunctionGemmaFormat, Gemma4Format
from pelton.serving.tools.harmony import HarmonyFormat
from pelton.serving.tools.hermes import HermesFormat
from pelton.serving.tools.json_object import JsonFormat
from pelton.serving.tools.llama3 import Llama3Format
from pelton.serving.tools.mistral import MistralFormat, MistralNamedFormat
from pelton.serving.tools.pythonic import PythonicFormat
from pelton.serving.tools.qwen_coder import QwenCoderFormat

# The first that knows a template is taken; the last one takes any.
_ROWS: tuple[ToolCallFormat, ...] = (
    QwenCoderFormat(),
    HermesFormat(),
    MistralNamedFormat(),
    MistralFormat(),
    DeepSeekFormat(),
    DeepSeek31Format(),
    HarmonyFormat(),
    FunctionGemmaFormat(),
    Gemma4Format(),
    PythonicFormat(),
    Llama3Format(),
    JsonFormat(),
)
TOOL_CALL_FORMATS: dict[str, ToolCallFormat] = {row.name: row for row in _ROWS}
# Other names of the same, as vLLM has them.
TOOL_CALL_ALIASES = {
    "qwen3": "hermes",
    "openai": "harmony",
    "gpt_oss": "harmony",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
    "generic": "json",
}
TOOL_CALL_NAMES = (*TOOL_CALL_FORMATS, *TOOL_CALL_ALIASES)


def tool_call_format(name: str) -> ToolCallFormat:
    """Raises `KeyError`."""
    return TOOL_CALL_FORMATS[TOOL_CALL_ALIASES.get(name, name)]


def detect_tool_call_format(template: str, model_name: str) -> ToolCallFormat:
    """The format of the model that this chat template belongs to."""
    return next(row for row in _ROWS if row.detect(template, model_name))
