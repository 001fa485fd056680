"""POST /tokenize and /detokenize, in the shapes of vLLM and llama.cpp."""

from __future__ import annotations

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from pelton.core.errors import InvalidRequestError
from pelton.serving.context import ServingContext
from pelton.serving.errors import json_response
from pelton.serving.openai.chat import chat_token_ids
from pelton.serving.openai.parameters import check_belongs
from pelton.serving.openai.requests import check_supported
from pelton.serving.openai.responses import DetokenizeResponse, TokenizeResponse, TokenPiece
from pelton.serving.openai.token_requests import DetokenizeRequest, TokenizeRequest
from pelton.serving.request_body import read_json_body


async def tokenize(context: ServingContext, http_request: Request) -> Response:
    request = await read_json_body(http_request, TokenizeRequest, context.config.max_body_bytes)
    check_supported(request)
    context.check_model(request.model)
    sent = [name for name in ("prompt", "messages", "content") if getattr(request, name) is not None]
    if len(sent) != 1:
        raise InvalidRequestError("send one of prompt, messages and content", param="prompt")
    if request.content is None:
        check_belongs(request, ("add_special",), "content")
    else:
        check_belongs(request, ("add_special_tokens",), "prompt or messages")
    if request.messages is None:
        chat_only = ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
        check_belongs(request, chat_only, "messages")
    if request.messages is not None:
        token_ids = await context.prepare(chat_token_ids, context, request)
    else:
        token_ids = await context.prepare(_prompt_token_ids, context, request)
    texts = [context.tokenizer.token_text(token_id) for token_id in token_ids] if request.return_token_strs else None
    tokens: list[int | TokenPiece] = list(token_ids)
    if request.with_pieces:
        tokens = [_piece(context, token_id) for token_id in token_ids]
    return json_response(
        TokenizeResponse(count=len(tokens), max_model_len=context.max_model_len, tokens=tokens, token_strs=texts)
    )


def _prompt_token_ids(context: ServingContext, request: TokenizeRequest) -> list[int]:
    if request.content is not None:
        return context.encode(request.content, add_special_tokens=bool(request.add_special), param="content")
    add_special_tokens = request.add_special_tokens is not False
    return context.encode(request.prompt or "", add_special_tokens=add_special_tokens, param="prompt")


def _piece(context: ServingContext, token_id: int) -> TokenPiece:
    data = context.tokenizer.token_bytes(token_id)
    try:
        return TokenPiece(id=token_id, piece=data.decode())
    except UnicodeDecodeError:
        return TokenPiece(id=token_id, piece=list(data))


async def detokenize(context: ServingContext, http_request: Request) -> Response:
    request = await read_json_body(http_request, DetokenizeRequest, context.config.max_body_bytes)
    context.check_model(request.model)
    vocab_size = context.tokenizer.vocab_size
    highest = max(request.tokens, default=0)
    if highest >= vocab_size:
        raise InvalidRequestError(
            f"tokens names token {highest}; token ids of this model are 0 to {vocab_size - 1}", param="tokens"
        )
    text = await context.prepare(_decode, context, request.tokens)
    return json_response(DetokenizeResponse(prompt=text, content=text if request.model is None else UNSET))


def _decode(context: ServingContext, token_ids: list[int]) -> str:
    return context.tokenizer.decode(token_ids, skip_special_tokens=False)
