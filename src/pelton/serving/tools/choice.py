"""What a request wants of its tools, whatever the endpoint calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from pelton.core.errors import InvalidRequestError
from pelton.serving.tools.format import ToolDefinition

MAX_TOOLS = 512


class ToolMode(StrEnum):
    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"  # one call or more


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """`tools` are those that may be called: a tool that is named by the choice is the only one, and required."""

    tools: tuple[ToolDefinition, ...] = ()
    mode: ToolMode = ToolMode.NONE
    is_named: bool = False
    is_parallel: bool = True

    @property
    def may_call(self) -> bool:
        return bool(self.tools) and self.mode is not ToolMode.NONE


NO_TOOLS = ToolUse()


def check_definitions(tools: Sequence[ToolDefinition], path: str = "tools") -> None:
    """Raises `InvalidRequestError` with the place of what cannot be a function's definition."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(f"{path} lists {len(tools)} tools; at most {MAX_TOOLS} are allowed", param=path)
    names: set[str] = set()
    for index, tool in enumerate(tools):
        place = f"{path}[{index}].function"
        if tool.name in names:
            raise InvalidRequestError(f"{place}.name is {tool.name!r}, as that of another tool", param=f"{place}.name")
        names.add(tool.name)
        _check_parameters(tool, f"{place}.parameters")


def _check_parameters(tool: ToolDefinition, path: str) -> None:
    schema = tool.parameters
    if schema.get("type", "object") != "object":
        raise InvalidRequestError(
            f"{path}.type is {schema['type']!r}; arguments are an object, so it must be 'object'", param=f"{path}.type"
        )
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        raise InvalidRequestError(f"{path}.properties must be an object", param=f"{path}.properties")
    for name, value in properties.items():
        if not isinstance(value, (dict, bool)):
            raise InvalidRequestError(
                f"{path}.properties.{name} must be a JSON schema", param=f"{path}.properties.{name}"
            )
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise InvalidRequestError(f"{path}.required must be a list of names", param=f"{path}.required")
