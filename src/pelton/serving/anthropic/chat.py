"""A message's request as that of a chat: from here on both are one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pelton.core.errors import InvalidRequestError
from pelton.serving.anthropic.conversation import chat_messages
from pelton.serving.anthropic.requests import (
    ContentBlock,
    CountTokensRequest,
    MessageRequest,
    ThinkingBlock,
    ThinkingParam,
    ToolChoiceParam,
    ToolParam,
    ToolResultBlock,
)
from pelton.serving.openai.as_chat import as_chat
from pelton.serving.openai.requests import ChatRequest, check_supported, out_of_place


def chat_request(request: CountTokensRequest) -> ChatRequest:
    """Raises `InvalidRequestError`."""
    messages = chat_messages(request.system, request.messages)
    body: dict[str, Any] = {"messages": messages}
    if request.model is not None:
        body["model"] = request.model
    if messages[-1]["role"] == "assistant":
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    _add_tools(body, request)
    if request.output_config is not None:
        if request.output_config.effort is not None:
            body["reasoning_effort"] = request.output_config.effort
        if request.output_config.format is not None:
            schema = {"name": "output", "schema": request.output_config.format.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if request.thinking is not None:
        _add_thinking(body, request.thinking)
    if isinstance(request, MessageRequest):
        body["max_completion_tokens"] = request.max_tokens
        for name in ("temperature", "top_p", "top_k", "stream"):
            if getattr(request, name) is not None:
                body[name] = getattr(request, name)
        if request.stop_sequences:
            body["stop"] = request.stop_sequences
        if request.metadata is not None and request.metadata.user_id is not None:
            body["user"] = request.metadata.user_id
    return as_chat(body)


def _add_tools(body: dict[str, Any], request: CountTokensRequest) -> None:
    tools = [_chat_tool(tool, f"tools[{index}]") for index, tool in enumerate(request.tools or ())]
    choice = request.tool_choice
    if choice is not None:
        _check_choice(choice)
    if not tools:
        if choice is not None and choice.type in ("any", "tool"):
            raise InvalidRequestError("tool_choice asks for a tool, but tools is empty", param="tool_choice")
        return
    body["tools"] = tools
    if choice is not None:
        body["tool_choice"] = _chat_choice(choice)
        if choice.disable_parallel_tool_use:
            body["parallel_tool_calls"] = False


def _chat_tool(tool: ToolParam, path: str) -> dict[str, Any]:
    check_supported(tool, f"{path}.")
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    for name in ("description", "strict"):
        if getattr(tool, name) is not None:
            function[name] = getattr(tool, name)
    return {"type": "function", "function": function}


def _chat_choice(choice: ToolChoiceParam) -> Any:
    if choice.type == "tool":
        if choice.name is None:
            raise InvalidRequestError("tool_choice.name is required", param="tool_choice.name")
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.type == "any" else choice.type


def _check_choice(choice: ToolChoiceParam) -> None:
    if choice.name is not None and choice.type != "tool":
        raise out_of_place("tool_choice", choice.type, "name", "tool")


def _add_thinking(body: dict[str, Any], thinking: ThinkingParam) -> None:
    if thinking.budget_tokens is not None and thinking.type != "enabled":
        raise out_of_place("thinking", thinking.type, "budget_tokens", "enabled")
    if thinking.display is not None and thinking.type == "disabled":
        raise out_of_place("thinking", "disabled", "display", "enabled")
    if thinking.type == "disabled":
        body["reasoning_effort"] = "none"
    if thinking.type == "enabled":
        if thinking.budget_tokens is None:
            raise InvalidRequestError("thinking.budget_tokens is required", param="thinking.budget_tokens")
        body["thinking_token_budget"] = thinking.budget_tokens
    if thinking.display == "omitted":
        body["include_reasoning"] = False


def asks_for_cache(request: CountTokensRequest) -> bool:
    """Whether anything in the request is marked to be cached."""
    if request.cache_control is not None:
        return True
    system = request.system if isinstance(request.system, list) else []
    blocks: list[Any] = [*system, *(request.tools or ())]
    for message in request.messages:
        blocks += _marked(message.content)
    return any(block.cache_control is not None for block in blocks)


def _marked(content: str | Sequence[ContentBlock]) -> list[Any]:
    if isinstance(content, str):
        return []
    results = [block.content for block in content if isinstance(block, ToolResultBlock)]
    inner = [part for parts in results if isinstance(parts, list) for part in parts]
    return [*(block for block in content if not isinstance(block, ThinkingBlock)), *inner]
