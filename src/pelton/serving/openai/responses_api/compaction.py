"""POST /v1/responses/compact: the model sums a conversation up, and the summary stands for it from then on."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from pelton.serving.built_answer import BuiltAnswer
from pelton.serving.caller import caller_of, tenant_of
from pelton.serving.context import ServingContext, new_answer_id, now_unix_s
from pelton.serving.conversation import prepare_turn
from pelton.serving.openai.chat import chat_conversation
from pelton.serving.openai.requests import ChatMessage, ChatRequest, check_supported
from pelton.serving.openai.responses_api.builder import BuildOptions, ResponseBuilder, item_id
from pelton.serving.openai.responses_api.chat import chat_request
from pelton.serving.openai.responses_api.conversation import seal
from pelton.serving.openai.responses_api.items import InputItem, input_items
from pelton.serving.openai.responses_api.listing import listed_item
from pelton.serving.openai.responses_api.objects import CompactedResponse, MessageItem, ResponseObject
from pelton.serving.openai.responses_api.requests import CompactRequest, InputTokensRequest
from pelton.serving.openai.sampling import chat_sampling
from pelton.serving.param_names import renamed_params
from pelton.serving.parsing.answer import AnswerPlan
from pelton.serving.request_body import read_json_body

MAX_SUMMARY_TOKENS = 1024
PROMPT = (
    "Sum up the conversation above, so that you can go on from the summary alone: what was asked for, what was "
    "decided and found out, what tools returned, and what is still to do. Write the summary only."
)


async def compact_response(context: ServingContext, http_request: Request) -> Response:
    """Nothing is stored: the client sends the output back as it is, ahead of what comes next."""
    context.check_ready()
    request = await read_json_body(http_request, CompactRequest, context.config.max_body_bytes)
    check_supported(request)
    context.check_model(request.model)
    tenant_id = tenant_of(http_request)
    own = await context.responses.resolve(tenant_id, input_items(request.input))
    earlier = await context.responses.conversation(tenant_id, request.previous_response_id)
    chat = _summary_request(request, earlier, own)
    caller = caller_of(http_request, chat)
    with renamed_params({"messages": "input", "prompt": "input"}):
        turn = await context.prepare(prepare_turn, context, chat_conversation(context, chat))
        room = context.max_model_len - len(turn.token_ids)
        chat.max_completion_tokens = max(1, min(MAX_SUMMARY_TOKENS, room))
        sampling = chat_sampling(chat, context.defaults)
        response = ResponseObject(
            id=new_answer_id("resp").replace("-", "_"),
            created_at=now_unix_s(),
            model=chat.model or context.model.names[0],
            status="in_progress",
            output=[],
        )
        generation = context.submit(response.id, [turn.token_ids], chat, sampling, caller)
    options = BuildOptions(plan=turn.plan or AnswerPlan(), spelling=context.spelling, emits=False)
    builder = ResponseBuilder(response, options)
    return BuiltAnswer(generation, builder, lambda: _compacted(response, [*earlier, *own]))


def _summary_request(request: CompactRequest, earlier: list[InputItem], own: list[InputItem]) -> ChatRequest:
    asked = InputTokensRequest(model=request.model, instructions=request.instructions)
    chat = chat_request(asked, earlier, own)
    last = chat.messages[-1]
    if last.role == "user" and isinstance(last.content, str):  # many templates know no two of them in a row
        last.content = f"{last.content}\n\n{PROMPT}"
    else:
        chat.messages.append(ChatMessage(role="user", content=PROMPT))
    chat.temperature = 0.0
    chat.reasoning_effort = "none"
    chat.prompt_cache_key = request.prompt_cache_key
    chat.previous_response_id = request.previous_response_id
    return chat


def _compacted(response: ResponseObject, items: list[InputItem]) -> CompactedResponse:
    """What users said, as they said it, and one item for all."""
    assert response.usage is not None
    said = [item for item in items if item.role == "user"]
    output = [listed_item(item, response.id, index) for index, item in enumerate(said)]
    text = "".join(part.text for item in response.output if isinstance(item, MessageItem) for part in item.content)
    made_id = item_id("cmp", response.id, 0)
    output.append({"type": "compaction", "id": made_id, "encrypted_content": seal(text.strip())})
    return CompactedResponse(id=response.id, created_at=response.created_at, output=output, usage=response.usage)
