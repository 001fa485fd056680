"""Items of the input as they are listed: each with an id, messages in their long form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from pelton.serving.openai.responses_api.builder import item_id
from pelton.serving.openai.responses_api.items import InputItem
from pelton.serving.openai.responses_api.objects import InputItemList

_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
    "compaction": "cmp",
}
# Beyond the items that an answer can have: no two ids are one.
_FIRST_INDEX = 0x8000


def listed_items(
    items: Sequence[InputItem], response_id: str, *, limit: int, after: str | None, descending: bool
) -> InputItemList:
    listed = [listed_item(item, response_id, index) for index, item in enumerate(items)]
    if descending:
        listed.reverse()
    start = 0
    if after is not None:
        start = next((index + 1 for index, item in enumerate(listed) if item["id"] == after), len(listed))
    page = listed[start : start + limit]
    return InputItemList(
        data=page,
        first_id=page[0]["id"] if page else None,
        last_id=page[-1]["id"] if page else None,
        has_more=start + limit < len(listed),
    )


def listed_item(item: InputItem, response_id: str, index: int) -> dict[str, Any]:
    kind = item.type or "message"
    known: dict[str, Any] = msgspec.to_builtins(item)
    known |= {"type": kind, "id": item.id or item_id(_PREFIXES[kind], response_id, _FIRST_INDEX + index)}
    if kind == "reasoning":
        known.setdefault("summary", [])
    elif kind != "compaction":
        known.setdefault("status", "completed")
    if isinstance(item.content, str):
        part_type = "output_text" if item.role == "assistant" else "input_text"
        known["content"] = [{"type": part_type, "text": item.content}]
    for part in known.get("content") or ():
        if part["type"] == "output_text":
            part.setdefault("annotations", [])
    return known
