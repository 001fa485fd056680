"""Tools of chat completions: their structs, and what they come to."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from pelton.core.errors import InvalidRequestError
from pelton.serving.tools.choice import MAX_TOOLS, NO_TOOLS, ToolMode, ToolUse, check_definitions
from pelton.serving.tools.format import ToolDefinition

FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.:-]{1,64}$")]
ModeName = Literal["none", "auto", "required"]


class FunctionDefinition(Struct, kw_only=True, forbid_unknown_fields=True):
    name: FunctionName
    description: str | None = None
    parameters: Annotated[dict[str, Any], Meta(description="A JSON schema of an object.")] | None = None
    strict: Annotated[bool, Meta(description="Arguments always follow the schema.")] | None = None


class Tool(Struct, kw_only=True, forbid_unknown_fields=True):
    function: FunctionDefinition
    type: Literal["function"] = "function"


class NamedFunction(Struct, kw_only=True, forbid_unknown_fields=True):
    name: str


class NamedTool(Struct, kw_only=True, forbid_unknown_fields=True):
    function: NamedFunction
    type: Literal["function"] = "function"


class AllowedTools(Struct, kw_only=True, forbid_unknown_fields=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Meta(min_length=1, max_length=MAX_TOOLS)]


class ToolChoice(Struct, kw_only=True, forbid_unknown_fields=True):
    """A function by its name, or a choice among some of the tools."""

    type: Literal["function", "allowed_tools"]
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


def tool_use(
    tools: list[Tool] | None,
    choice: ModeName | ToolChoice | None,
    *,
    is_parallel: bool,
    enable_auto: bool,
) -> ToolUse:
    """Raises `InvalidRequestError`."""
    definitions = tuple(_definition(tool) for tool in tools or ())
    check_definitions(definitions)
    if not definitions:
        if choice in (None, "none"):
            return NO_TOOLS
        raise InvalidRequestError("tool_choice needs tools to choose from", param="tool_choice")
    if choice is None:
        choice = "auto"
    if choice == "auto" and not enable_auto:
        raise InvalidRequestError(
            "this server was started with --no-enable-auto-tool-choice; tool_choice may be 'none', 'required' or a "
            "function",
            param="tool_choice",
        )
    if not isinstance(choice, ToolChoice):
        return ToolUse(tools=definitions, mode=ToolMode(choice), is_parallel=is_parallel)
    if choice.type == "function":
        if choice.function is None or choice.allowed_tools is not None:
            raise InvalidRequestError("tool_choice.function is required, and nothing else", param="tool_choice")
        found = _named(definitions, [choice.function.name], "tool_choice.function.name")
        return ToolUse(tools=found, mode=ToolMode.REQUIRED, is_named=True, is_parallel=False)
    if choice.allowed_tools is None or choice.function is not None:
        raise InvalidRequestError("tool_choice.allowed_tools is required, and nothing else", param="tool_choice")
    allowed = choice.allowed_tools
    names = [tool.function.name for tool in allowed.tools]
    found = _named(definitions, names, "tool_choice.allowed_tools.tools")
    return ToolUse(tools=found, mode=ToolMode(allowed.mode), is_parallel=is_parallel)


def _definition(tool: Tool) -> ToolDefinition:
    function = tool.function
    definition = ToolDefinition(name=function.name, description=function.description, strict=function.strict is True)
    if function.parameters is None or not function.parameters:
        return definition
    return ToolDefinition(
        name=function.name,
        description=function.description,
        strict=function.strict is True,
        parameters=function.parameters,
    )


def _named(tools: tuple[ToolDefinition, ...], names: list[str], path: str) -> tuple[ToolDefinition, ...]:
    known = {tool.name for tool in tools}
    for name in names:
        if name not in known:
            raise InvalidRequestError(f"{path} is {name!r}, which is none of the tools", param=path)
    return tuple(tool for tool in tools if tool.name in names)
