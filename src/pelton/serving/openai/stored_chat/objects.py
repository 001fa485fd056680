"""Bodies, queries and answers below /v1/chat/completions that are about stored ones."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from pelton.serving.openai.requests import Metadata, ShortText
from pelton.serving.openai.responses import StoredChatCompletion


class CompletionsQuery(Struct, kw_only=True):
    """Of a page; `after` is the last of the page before. All pairs of `metadata[KEY]=VALUE` must be there."""

    after: ShortText | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "asc"
    model: str | UnsetType = UNSET
    metadata: Metadata | UnsetType = UNSET


class StoredMessagesQuery(Struct, kw_only=True):
    after: ShortText | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "asc"


class CompletionChanges(Struct, kw_only=True, forbid_unknown_fields=True):
    metadata: Metadata | None


class CompletionList(Struct, kw_only=True):
    data: list[StoredChatCompletion]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class StoredMessageList(Struct, kw_only=True):
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class DeletedCompletion(Struct, kw_only=True):
    id: str
    deleted: bool = True
    object: Literal["chat.completion.deleted"] = "chat.completion.deleted"
