"""Bodies of /v1/messages. A parameter that is not implemented is `neutral`, as in a chat's request."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from pelton.core.sampling_params import MAX_STOP_STRINGS
from pelton.serving.openai.requests import INT32_MAX, StopString, neutral

MAX_MESSAGES = 1 << 14
MAX_TOOLS = 1024
BLOCK_TYPES = ("text", "thinking", "tool_use", "tool_result")


class CacheControl(Struct, kw_only=True, forbid_unknown_fields=True):
    """Prefixes are cached whatever it says; `ttl` is how long one is wanted, not how long one is kept."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class InnerBlock(Struct, kw_only=True):
    """Of a tool's result. Fields of other kinds of block are refused with their type."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["text"]})]
    text: str | None = None
    cache_control: CacheControl | None = None


class TextBlock(Struct, kw_only=True, forbid_unknown_fields=True):
    text: str
    type: Literal["text"] = "text"
    cache_control: CacheControl | None = None
    citations: Annotated[Any, neutral([])] = None


class ContentBlock(Struct, kw_only=True):
    """Fields of other kinds of block are refused with their type."""

    type: Annotated[str, Meta(extra_json_schema={"enum": list(BLOCK_TYPES)})]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[InnerBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


class MessageParam(Struct, kw_only=True, forbid_unknown_fields=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class ToolParam(Struct, kw_only=True):
    """A tool that the client runs. Fields of other kinds of tool are refused with their type."""

    name: str
    type: Annotated[str, Meta(extra_json_schema={"enum": ["custom", None]})] | None = None
    input_schema: dict[str, Any] | None = None
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
    context_management: Annotated[Any, neutral()] = None


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
