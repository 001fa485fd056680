"""Bodies of /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from pelton.serving.openai.requests import MAX_LISTED_TOKENS, Messages, TokenId, Tools, neutral


class TokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize: a prompt, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    content: Annotated[str, Meta(description="A prompt, as llama.cpp names it.")] | None = None
    add_special_tokens: bool | None = None
    add_special: Annotated[bool, Meta(description="Of content; default: false.")] | None = None
    parse_special: Annotated[Any, neutral(True)] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    return_token_strs: bool | None = None
    with_pieces: Annotated[bool, Meta(description="Tokens with their text, as llama.cpp answers.")] = False
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: Annotated[Any, neutral()] = None
    tools: Tools | None = None


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /detokenize."""

    tokens: Annotated[list[TokenId], Meta(max_length=MAX_LISTED_TOKENS)]
    model: str | None = None
