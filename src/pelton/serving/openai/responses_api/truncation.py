"""`truncation: auto`: a conversation that is too long loses its oldest messages, but not its instructions."""

from __future__ import annotations

from dataclasses import replace

from pelton.core.errors import ContextLengthExceededError
from pelton.serving.context import ServingContext
from pelton.serving.conversation import Conversation, Message, PreparedTurn, prepare_turn

# What has more than this is too long, without a look at its tokens: they are hardly ever this long.
MAX_CHARS_PER_TOKEN = 32


def prepare_truncated(context: ServingContext, conversation: Conversation, num_reserved_tokens: int) -> PreparedTurn:
    """As much of the conversation as leaves room for the answer. Slow: runs in the pool.

    Raises `ContextLengthExceededError` where not even the last message fits.
    """
    most = context.max_model_len - num_reserved_tokens
    messages = conversation.messages
    first = next((index for index, message in enumerate(messages) if message["role"] != "system"), 0)
    # No result of a call without the call.
    starts = [first, *(index for index in range(first + 1, len(messages)) if messages[index]["role"] != "tool")]
    best, low = None, _first_small_enough(messages, starts, most * MAX_CHARS_PER_TOKEN)
    if low == 0:
        best, low = _try_prepare(context, conversation, most), 1  # most fit whole
    high = len(starts) - 1 if best is None else 0
    while low <= high:
        middle = (low + high) // 2
        kept = messages[:first] + messages[starts[middle] :]
        turn = _try_prepare(context, replace(conversation, messages=kept), most)
        if turn is None:
            low = middle + 1
        else:
            best, high = turn, middle - 1
    if best is None:
        raise ContextLengthExceededError(
            f"even the last message alone leaves no room for {num_reserved_tokens} tokens in a context of "
            f"{context.max_model_len}",
            param=conversation.param,
        )
    return best


def _first_small_enough(messages: list[Message], starts: list[int], max_chars: int) -> int:
    """Which start is the first that is worth rendering; the last one always is."""
    num_chars, end = 0, len(messages)
    for index in range(len(starts) - 1, -1, -1):
        num_chars += sum(len(message["content"]) for message in messages[starts[index] : end])
        end = starts[index]
        if num_chars > max_chars:
            return min(index + 1, len(starts) - 1)
    return 0


def _try_prepare(context: ServingContext, conversation: Conversation, most: int) -> PreparedTurn | None:
    try:
        turn = prepare_turn(context, conversation)
    except ContextLengthExceededError:
        return None
    return turn if len(turn.token_ids) <= most else None
