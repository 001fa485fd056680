"""A response's request as that of a chat: from here on both are one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pelton.core.errors import InvalidRequestError
from pelton.serving.openai.as_chat import as_chat
from pelton.serving.openai.requests import ChatRequest, out_of_place
from pelton.serving.openai.responses_api.conversation import Conversation, chat_tools
from pelton.serving.openai.responses_api.items import InputItem
from pelton.serving.openai.responses_api.requests import (
    SAME_IN_CHAT,
    AllowedToolsChoice,
    FunctionChoice,
    InputTokensRequest,
    ResponseRequest,
    TextFormat,
    ToolChoice,
)

LOGPROBS = "message.output_text.logprobs"


def chat_request(request: InputTokensRequest, earlier: Sequence[InputItem], own: Sequence[InputItem]) -> ChatRequest:
    """`earlier` are the items of the responses that this one goes on from. Raises `InvalidRequestError`."""
    conversation = Conversation()
    if request.instructions is not None:
        conversation.messages.append({"role": "system", "content": request.instructions})
    conversation.add_all(earlier, "previous_response_id")
    conversation.add_all(own)
    if not earlier and not own:
        raise InvalidRequestError(
            "input is required, unless previous_response_id names a response to go on from",
            param="input",
            code="missing_required_parameter",
        )
    body: dict[str, Any] = {"messages": conversation.messages}
    for name in SAME_IN_CHAT:
        value = getattr(request, name, None)
        if value is not None:
            body[name] = value
    _add_tools(body, request)
    if request.reasoning is not None and request.reasoning.effort is not None:
        body["reasoning_effort"] = request.reasoning.effort
    if request.text is not None and request.text.format is not None:
        body["response_format"] = _response_format(request.text.format)
    if isinstance(request, ResponseRequest):
        if request.max_output_tokens is not None:
            body["max_completion_tokens"] = request.max_output_tokens
        if request.previous_response_id is not None:
            body["previous_response_id"] = request.previous_response_id
        if request.top_logprobs or LOGPROBS in (request.include or ()):
            body |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    return as_chat(body)


def _add_tools(body: dict[str, Any], request: InputTokensRequest) -> None:
    tools = chat_tools(request.tools)
    choice = request.tool_choice
    if isinstance(choice, AllowedToolsChoice):
        allowed = {tool.name for tool in choice.tools}
        tools = [tool for tool in tools if tool["function"]["name"] in allowed]
        if len(tools) < len(allowed):
            raise InvalidRequestError("tool_choice allows tools that are not in tools", param="tool_choice.tools")
    if not tools:
        body.pop("parallel_tool_calls", None)
        if choice not in (None, "none", "auto"):
            raise InvalidRequestError("tool_choice asks for a tool call, but tools is empty", param="tool_choice")
        return
    body["tools"] = tools
    if choice is not None:
        body["tool_choice"] = _chat_choice(choice)


def _chat_choice(choice: ToolChoice) -> Any:
    if isinstance(choice, AllowedToolsChoice):
        return choice.mode or "auto"
    if isinstance(choice, FunctionChoice):
        return {"type": "function", "function": {"name": choice.name}}
    return choice


def _response_format(format: TextFormat) -> dict[str, Any]:
    if format.type != "json_schema":
        for name in ("schema", "name", "description", "strict"):
            if getattr(format, name) is not None:
                raise out_of_place("text.format", format.type, name, "json_schema")
        return {"type": format.type}
    if format.schema is None or format.name is None:
        missing = "schema" if format.schema is None else "name"
        raise InvalidRequestError(
            f"text.format.{missing} is required", param=f"text.format.{missing}", code="missing_required_parameter"
        )
    schema: dict[str, Any] = {"name": format.name, "schema": format.schema}
    for name in ("description", "strict"):
        if getattr(format, name) is not None:
            schema[name] = getattr(format, name)
    return {"type": "json_schema", "json_schema": schema}
