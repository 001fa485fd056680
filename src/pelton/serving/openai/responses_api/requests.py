"""Bodies of /v1/responses. A parameter that is not implemented is `neutral`, as in the chat's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from pelton.core.errors import InvalidRequestError
from pelton.core.sampling_params import MAX_STOP_STRINGS
from pelton.serving.openai.requests import (
    INT32_MAX,
    MAX_TIMEOUT_S,
    Count,
    LogitBias,
    Logprobs,
    Metadata,
    Penalty,
    Seed,
    ShortText,
    StopString,
    listed,
    neutral,
)
from pelton.serving.openai.responses_api.items import Items

MAX_TOOLS = 1024


class ResponseTool(Struct, kw_only=True, forbid_unknown_fields=True):
    """A function."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["function"]})]
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Annotated[Any, neutral(False)] = None
    output_schema: Annotated[Any, neutral()] = None
    allowed_callers: Annotated[Any, neutral(["direct"])] = None


# Decoded one by one, so that an error names the tool.
Tools = Annotated[list[Raw], Meta(max_length=MAX_TOOLS, extra_json_schema=listed("ResponseTool"))]


class FunctionChoice(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="function"):
    name: str


class AllowedTool(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]
    name: str


class AllowedToolsChoice(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"):
    tools: Annotated[list[AllowedTool], Meta(min_length=1, max_length=MAX_TOOLS)]
    mode: Literal["auto", "required"] | None = None


ToolChoice = Literal["none", "auto", "required"] | FunctionChoice | AllowedToolsChoice


class TextFormat(Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields beside `type` are those of `json_schema`."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Meta(description="For your records; changes nothing.")] | None = None
    schema: dict[str, Any] | None = None
    description: Annotated[str, Meta(description="For your records; changes nothing.")] | None = None
    strict: Annotated[bool, Meta(description="The schema is enforced either way.")] | None = None


class TextOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    format: TextFormat | None = None
    verbosity: Annotated[Any, neutral("medium")] = None


class ReasoningOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    # There is no summary besides the reasoning itself, so "auto" asks for nothing.
    summary: Annotated[Any, neutral("auto")] = None
    generate_summary: Annotated[Any, neutral("auto")] = None
    context: Annotated[Any, neutral("auto", "all_turns")] = None
    mode: Annotated[Any, neutral("standard")] = None


class ResponseStreamOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    include_obfuscation: Annotated[Any, neutral(False)] = None


Include = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]


class InputTokensRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/responses/input_tokens, and what a response takes of the same."""

    input: Annotated[str | Items, Meta(description="Required, unless previous_response_id is there.")] | None = None
    model: Annotated[str, Meta(description="A served name; default: the served model.")] | None = None
    instructions: str | None = None
    previous_response_id: ShortText | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Meta(description="Variables of the chat template.")] | None = None
    conversation: Annotated[Any, neutral()] = None
    personality: Annotated[Any, neutral()] = None


class ResponseRequest(InputTokensRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/responses."""

    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    background: bool | None = None
    store: Annotated[bool, Meta(description="Default true: it can be retrieved and gone on from.")] | None = None
    include: Annotated[list[Include], Meta(max_length=16)] | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=INT32_MAX)] | None = None
    max_tool_calls: (
        Annotated[int, Meta(ge=1, le=INT32_MAX, description="Of built-in tools, as OpenAI has it: there are none.")]
        | None
    ) = None
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_logprobs: Logprobs | None = None
    metadata: Metadata | None = None
    user: Annotated[ShortText, Meta(description="For your records; changes nothing.")] | None = None
    safety_identifier: Annotated[ShortText, Meta(description="For your records; changes nothing.")] | None = None
    prompt_cache_key: Annotated[ShortText, Meta(description="Names the session, as X-Session-Id does.")] | None = None

    # Beyond OpenAI's.
    top_k: Annotated[int, Meta(ge=-1, le=INT32_MAX, description="0 or -1: off.")] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool = False
    priority: Annotated[int, Meta(ge=-(2**31), le=INT32_MAX, description="Lower runs first.")] = 0
    cache_salt: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
    timeout_s: Annotated[float, Meta(gt=0.0, le=MAX_TIMEOUT_S, description="Deadline of this request.")] | None = None

    service_tier: Annotated[Any, neutral("auto", "default")] = None
    prompt_cache_retention: Annotated[Any, neutral("in_memory", "in-memory")] = None
    prompt_cache_options: Annotated[Any, neutral()] = None
    prompt: Annotated[Any, neutral()] = None
    context_management: Annotated[Any, neutral([])] = None
    moderation: Annotated[Any, neutral()] = None
    access_programs: Annotated[Any, neutral()] = None
    background_options: Annotated[Any, neutral()] = None
    image: Annotated[Any, neutral()] = None


class CompactRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/responses/compact."""

    model: Annotated[str, Meta(description="A served name; null: the served model.")] | None
    input: Annotated[str | Items, Meta(description="Required, unless previous_response_id is there.")] | None = None
    instructions: str | None = None
    previous_response_id: ShortText | None = None
    prompt_cache_key: Annotated[ShortText, Meta(description="Names the session, as X-Session-Id does.")] | None = None
    prompt_cache_options: Annotated[Any, neutral()] = None
    prompt_cache_retention: Annotated[Any, neutral("in_memory", "in-memory")] = None
    service_tier: Annotated[Any, neutral("auto", "default")] = None


# Of ours that a chat has under the same name.
SAME_IN_CHAT = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "stop",
    "min_tokens",
    "ignore_eos",
    "priority",
    "cache_salt",
    "prompt_cache_key",
    "timeout_s",
    "user",
    "stream",
    "parallel_tool_calls",
    "chat_template_kwargs",
)


class RetrieveQuery(Struct, kw_only=True):
    """GET /v1/responses/{id}."""

    stream: bool = False
    starting_after: Annotated[int, Meta(ge=0, le=INT32_MAX)] | UnsetType = UNSET
    include_obfuscation: Annotated[bool, Meta(extra_json_schema={"enum": [False]})] = False


class InputItemsQuery(Struct, kw_only=True):
    """GET /v1/responses/{id}/input_items."""

    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: ShortText | UnsetType = UNSET


def check_kinds(body: Any) -> None:
    """Raises `InvalidRequestError` for a choice of a kind that is not known, of a body that could not be decoded."""
    choice = body.get("tool_choice") if isinstance(body, dict) else None
    if not isinstance(choice, dict):
        return
    _check_kind(choice, "tool_choice", ("function", "allowed_tools"))
    tools = choice.get("tools")
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        if isinstance(tool, dict):
            _check_kind(tool, f"tool_choice.tools[{index}]", ("function",))


def _check_kind(value: dict[str, Any], path: str, kinds: Sequence[str]) -> None:
    kind = value.get("type")
    if isinstance(kind, str) and kind not in kinds:
        raise InvalidRequestError(
            f"{path} is of type {kind[:64]!r}; it may be {' or '.join(map(repr, kinds))}",
            param=f"{path}.type",
            code="unsupported_parameter",
        )
