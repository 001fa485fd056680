"""Items of a conversation, one thing said, called, answered or thought each: what may be sent, and sent back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, Struct, field

from pelton.core.errors import InvalidRequestError
from pelton.serving.openai.requests import ShortText, check_supported, listed, neutral
from pelton.serving.request_body import decode_inner

MAX_ITEMS = 1 << 14
# Parts of a message's content, with the fields that mean something in them.
PART_FIELDS = {
    "input_text": ("text",),
    "output_text": ("text", "annotations", "logprobs", "parsed"),
    "text": ("text", "annotations", "logprobs", "parsed"),
    "refusal": ("refusal",),
    "reasoning_text": ("text",),
}
PART_TYPES = tuple(PART_FIELDS)
Phase = Annotated[Literal["commentary", "final_answer"], Meta(description="Of an answer sent back; changes nothing.")]
SentBack = Meta(description="Of an answer that is sent back; changes nothing.")
Parsed = Meta(description="What the official client made of it; changes nothing.")


class InputPart(Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Of a message's content, or of what a function returned."""

    type: Annotated[str, Meta(extra_json_schema={"enum": [*PART_TYPES]})]
    text: str | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any], SentBack] | None = None
    logprobs: Annotated[list[Any], SentBack] | None = None
    parsed: Annotated[Any, Parsed] = None
    prompt_cache_breakpoint: Annotated[Any, neutral()] = None


class SummaryPart(Struct, kw_only=True, forbid_unknown_fields=True):
    text: str
    type: Literal["summary_text"] = "summary_text"


# Which fields mean something in an item of a type, beside those that all have.
FIELDS = {
    "message": ("role", "content", "status", "phase"),
    "function_call": ("call_id", "name", "arguments", "status", "parsed_arguments"),
    "function_call_output": ("call_id", "name", "output", "status"),
    "reasoning": ("summary", "content", "encrypted_content", "status"),
    "compaction": ("encrypted_content",),
    "item_reference": (),
}
_COMMON = ("type", "id", "created_by", "caller", "namespace", "async_")


class InputItem(Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Every field that the official client's types of the items above have, so that an answer can be sent back."""

    type: Annotated[str, Meta(extra_json_schema={"enum": [*FIELDS, None]})] | None = None
    id: ShortText | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[InputPart] | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    call_id: ShortText | None = None
    name: ShortText | None = None
    arguments: str | None = None
    parsed_arguments: Annotated[Any, Parsed] = None
    output: str | list[InputPart] | None = None
    summary: list[SummaryPart] | None = None
    encrypted_content: str | None = None
    phase: Phase | None = None
    created_by: Annotated[str, SentBack] | None = None
    caller: Annotated[Any, neutral()] = None
    namespace: Annotated[Any, neutral()] = None
    async_: Annotated[Any, neutral(False)] = field(default=None, name="async")
    # As the official client's model_dump() writes it.
    dumped_async: Annotated[None, SentBack] = field(default=None, name="async_")


# Decoded one by one, so that an error names the item.
Items = Annotated[list[Raw], Meta(min_length=1, max_length=MAX_ITEMS, extra_json_schema=listed("InputItem"))]


def input_items(input: str | Sequence[Raw] | None) -> list[InputItem]:
    """Raises `InvalidRequestError` for what is none, or has a field that its kind has not."""
    if isinstance(input, str):
        return [InputItem(type="message", role="user", content=input)]
    return [_decode(raw, f"input[{index}]") for index, raw in enumerate(input or ())]


def item_type(item: InputItem, path: str) -> str:
    kind = item.type
    if kind is None:
        kind = "message" if item.role is not None else "item_reference"
    check_item_type(kind, path)
    return kind


def check_item_type(kind: str, path: str) -> None:
    if kind not in FIELDS:
        raise InvalidRequestError(
            f"{path} is of type {kind[:64]!r}, which is not supported; items may be {', '.join(FIELDS)}",
            param=f"{path}.type",
            code="unsupported_parameter",
        )


def part_text(part: InputPart, path: str) -> str:
    """Raises `InvalidRequestError` for what is not text."""
    check_part_type(part.type, path)
    check_supported(part, f"{path}.")
    for name in ("text", "refusal", "annotations", "logprobs", "parsed"):
        if getattr(part, name) and name not in PART_FIELDS[part.type]:
            raise InvalidRequestError(
                f"{path} is of type {part.type!r}, which has no {name}",
                param=f"{path}.{name}",
                code="unknown_parameter",
            )
    name = "refusal" if part.type == "refusal" else "text"
    text: str | None = getattr(part, name)
    if text is None:
        raise InvalidRequestError(
            f"{path}.{name} is required", param=f"{path}.{name}", code="missing_required_parameter"
        )
    return text


def check_part_type(kind: str, path: str) -> None:
    if kind not in PART_TYPES:
        raise InvalidRequestError(
            f"{path} is of type {kind[:64]!r}; the model reads text only",
            param=f"{path}.type",
            code="unsupported_content_type",
        )


def _decode(raw: Raw, path: str) -> InputItem:
    item = decode_inner(raw, InputItem, path, _check_kinds)
    kind = item_type(item, path)
    known = FIELDS[kind]
    for name in item.__struct_fields__:
        if name not in known and name not in _COMMON and getattr(item, name) is not None:
            raise InvalidRequestError(
                f"{path} is of type {kind!r}, which has no {name}", param=f"{path}.{name}", code="unknown_parameter"
            )
    check_supported(item, f"{path}.")
    return item


def _check_kinds(item: Any, path: str) -> None:
    if not isinstance(item, dict):
        return
    if isinstance(item.get("type"), str):
        check_item_type(item["type"], path)
    for name in ("content", "output"):
        parts = item.get(name)
        for index, part in enumerate(parts if isinstance(parts, list) else ()):
            if isinstance(part, dict) and isinstance(part.get("type"), str):
                check_part_type(part["type"], f"{path}.{name}[{index}]")
