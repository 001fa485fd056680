"""`setting`: a config field with its help text, read by the CLI, the docs table and error messages."""

from __future__ import annotations

from dataclasses import Field, field, fields
from typing import Any


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with help text. Further metadata: `choices`, `alias` (a second flag name)."""
    return field(default=default, metadata={"help": help, **metadata})


def setting_help(config_field: Field[Any]) -> str:
    return str(config_field.metadata.get("help", ""))


def setting_names(config_class: type) -> list[str]:
    return [config_field.name for config_field in fields(config_class)]
