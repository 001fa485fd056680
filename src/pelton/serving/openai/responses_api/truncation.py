"""`truncation: auto`: a conversation that is too long loses its oldest messages, but not its instructions."""

from __future__ import annotations

from pelton.core.errors import ContextLengthExceededError
from pelton.serving.context import ServingContext
from pelton.serving.openai.chat import chat_prompt
from pelton.serving.openai.requests import ChatMessage, ChatRequest


def truncated_prompt(context: ServingContext, chat: ChatRequest, num_reserved_tokens: int) -> list[int]:
    """Token ids of as much of the conversation as leaves room for the answer; shortens `chat.messages`.

    Slow: runs in the pool. Raises `ContextLengthExceededError` where not even the last message fits.
    """
    most = context.max_model_len - num_reserved_tokens
    messages = list(chat.messages)
    first = next((index for index, message in enumerate(messages) if message.role not in _KEPT), 0)
    starts = [first, *_cuts(messages, first)]
    low, high = 0, len(starts) - 1  # the first cut that fits is within
    best: tuple[list[ChatMessage], list[int]] | None = None
    while low <= high:
        middle = (low + high) // 2 if best is not None or low else 0  # most conversations fit whole
        kept = messages[:first] + messages[starts[middle] :]
        prompt = _try_prompt(context, chat, kept, most)
        if prompt is None:
            low = middle + 1
        else:
            best, high = (kept, prompt), middle - 1
    if best is None:
        raise ContextLengthExceededError(
            f"even the last message alone leaves no room for {num_reserved_tokens} tokens in a context of "
            f"{context.max_model_len}",
            param="input",
        )
    chat.messages, prompt = best
    return prompt


_KEPT = ("system", "developer")


def _cuts(messages: list[ChatMessage], first: int) -> list[int]:
    """Where a conversation may begin: no result of a call without the call."""
    return [index for index in range(first + 1, len(messages)) if messages[index].role != "tool"]


def _try_prompt(context: ServingContext, chat: ChatRequest, messages: list[ChatMessage], most: int) -> list[int] | None:
    chat.messages = messages
    try:
        prompt = chat_prompt(context, chat)
    except ContextLengthExceededError:
        return None
    return prompt if len(prompt) <= most else None
