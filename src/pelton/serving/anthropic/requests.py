"""Bodies of /v1/messages. A parameter that is not implemented is `neutral`, as in a chat's request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from pelton.core.errors import InvalidRequestError
from pelton.core.sampling_params import MAX_STOP_STRINGS
from pelton.serving.openai.requests import INT32_MAX, CacheControl, StopString, neutral

MAX_MESSAGES = 1 << 14
MAX_TOOLS = 1024
# What agents send to say that no thinking is to be taken out of the conversation; none is.
KEPT_THINKING = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
BLOCK_TYPES = ("text", "thinking", "tool_use", "tool_result")


class MessagesQuery(Struct, kw_only=True):
    beta: Annotated[bool, Meta(description="Anthropic's clients send it; changes nothing.")] = False


class TextBlock(Struct, kw_only=True, forbid_unknown_fields=True):
    """Of the system prompt."""

    text: str
    type: Literal["text"] = "text"
    cache_control: CacheControl | None = None
    citations: Annotated[Any, neutral([])] = None


class InnerBlock(Struct, kw_only=True, forbid_unknown_fields=True):
    """Of a tool's result."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[Any, neutral([])] = None


# Blocks of a message: each kind has its own fields.
class SaidBlock(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[Any, neutral([])] = None
    parsed_output: Annotated[Any, Meta(description="What the official client made of text; changes nothing.")] = None


class ThinkingBlock(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="thinking"):
    thinking: str
    signature: Annotated[str, Meta(description="Of an answer that is sent back; changes nothing.")] | None = None


class ToolUseBlock(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: Annotated[Any, neutral({"type": "direct"})] = None
    toolset_name: Annotated[Any, neutral()] = None


class ToolResultBlock(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="tool_result"):
    tool_use_id: str
    content: str | list[InnerBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None
    toolset_name: Annotated[Any, neutral()] = None


ContentBlock = SaidBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock


class MessageParam(Struct, kw_only=True, forbid_unknown_fields=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class ToolParam(Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool that the client runs."""

    name: str
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    description: str | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    # Arguments are streamed as the model writes them, asked for or not.
    eager_input_streaming: bool | None = None
    input_examples: Annotated[Any, neutral([])] = None
    defer_loading: Annotated[Any, neutral(False)] = None
    allowed_callers: Annotated[Any, neutral(["direct"])] = None


class ToolChoiceParam(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingParam(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Meta(ge=1, le=INT32_MAX)] | None = None
    display: (
        Annotated[
            Literal["summarized", "omitted"],
            Meta(description="`summarized` shows the thinking as it is: nothing here makes summaries."),
        ]
        | None
    ) = None


class OutputFormat(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class MessageMetadata(Struct, kw_only=True, forbid_unknown_fields=True):
    user_id: Annotated[str, Meta(max_length=512, description="For your records; changes nothing.")] | None = None


class CountTokensRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/messages/count_tokens, and what a message takes of the same."""

    messages: Annotated[list[MessageParam], Meta(min_length=1, max_length=MAX_MESSAGES)]
    model: Annotated[str, Meta(description="A served name; default: the served model.")] | None = None
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[ToolParam], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoiceParam | None = None
    thinking: ThinkingParam | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    speed: Annotated[Any, neutral("standard")] = None
    user_profile_id: Annotated[Any, neutral()] = None
    workspace_id: Annotated[Any, neutral()] = None
    mcp_servers: Annotated[Any, neutral([])] = None
    context_management: Annotated[Any, neutral({"edits": []}, KEPT_THINKING)] = None


class MessageRequest(CountTokensRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Meta(ge=1, le=INT32_MAX, description="Fewer come where the context holds no more.")]
    stream: bool | None = None
    stop_sequences: Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=INT32_MAX, description="0 or -1: off.")] | None = None
    metadata: MessageMetadata | None = None
    service_tier: Annotated[Any, neutral("auto", "standard_only")] = None
    inference_geo: Annotated[Any, neutral()] = None
    container: Annotated[Any, neutral()] = None
    diagnostics: Annotated[Any, neutral()] = None
    thread: Annotated[Any, neutral()] = None


def check_kinds(body: Any) -> None:
    """Raises `InvalidRequestError` for the first block or tool of a kind that is not known.

    Of a body that could not be decoded: what is of another kind has other fields too, but it is the kind that is wrong.
    """
    if not isinstance(body, dict):
        return
    for index, tool in _dicts(body.get("tools")):
        kind = tool.get("type")
        if isinstance(kind, str) and kind != "custom":
            place = f"tools[{index}]"
            raise InvalidRequestError(
                f"{place} is of type {kind[:64]!r}; tools are of type 'custom', and the client runs them",
                param=f"{place}.type",
                code="unsupported_parameter",
            )
    for number, message in _dicts(body.get("messages")):
        for index, block in _dicts(message.get("content")):
            place = f"messages[{number}].content[{index}]"
            _check_block(block, place, BLOCK_TYPES)
            for inner_index, inner in _dicts(block.get("content")):
                _check_block(inner, f"{place}.content[{inner_index}]", ("text",))


def _dicts(values: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for index, value in enumerate(values if isinstance(values, list) else ()):
        if isinstance(value, dict):
            yield index, value


def _check_block(block: dict[str, Any], path: str, kinds: Sequence[str]) -> None:
    kind = block.get("type")
    if not isinstance(kind, str) or kind in kinds:
        return
    is_text_only = kind in ("image", "document") or len(kinds) == 1
    problem = "the model reads text only" if is_text_only else "it is not supported"
    raise InvalidRequestError(
        f"{path} is of type {kind[:64]!r}; {problem}. Blocks may be {', '.join(kinds)}",
        param=f"{path}.type",
        code="unsupported_content_type",
    )
