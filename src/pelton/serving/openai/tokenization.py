"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from pelton.core.errors import InvalidRequestError
from pelton.serving.context import ServingContext
from pelton.serving.conversation import render
from pelton.serving.errors import json_response
from pelton.serving.openai.chat import chat_conversation
from pelton.serving.openai.requests import DetokenizeRequest, TokenizeRequest, check_supported
from pelton.serving.openai.responses import DetokenizeResponse, TokenizeResponse
from pelton.serving.request_body import read_json_body


async def tokenize(context: ServingContext, http_request: Request) -> Response:
    request = await read_json_body(http_request, TokenizeRequest, context.config.max_body_bytes)
    check_supported(request)
    context.check_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequestError("send either prompt or messages", param="prompt")
    if request.messages is None:
        for name in ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"):
            if getattr(request, name):
                raise InvalidRequestError(f"{name} belongs to messages, and there are none", param=name)
    if request.messages is not None:
        token_ids = await context.prepare(_chat_token_ids, context, request)
    else:
        token_ids = await context.prepare(_prompt_token_ids, context, request)
    texts = [context.tokenizer.token_text(token_id) for token_id in token_ids] if request.return_token_strs else None
    return json_response(
        TokenizeResponse(count=len(token_ids), max_model_len=context.max_model_len, tokens=token_ids, token_strs=texts)
    )


def _chat_token_ids(context: ServingContext, request: TokenizeRequest) -> list[int]:
    conversation = chat_conversation(context, request)
    return context.encode(
        render(context, conversation), add_special_tokens=conversation.add_special_tokens, param=conversation.param
    )


def _prompt_token_ids(context: ServingContext, request: TokenizeRequest) -> list[int]:
    add_special_tokens = request.add_special_tokens is not False
    return context.encode(request.prompt or "", add_special_tokens=add_special_tokens, param="prompt")


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
    return json_response(DetokenizeResponse(prompt=text))


def _decode(context: ServingContext, token_ids: list[int]) -> str:
    return context.tokenizer.decode(token_ids, skip_special_tokens=False)
