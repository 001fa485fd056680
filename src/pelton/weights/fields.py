"""Checked access to untrusted key-value data (config.json, GGUF metadata)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from pelton.core.errors import ModelFileError
from pelton.weights.mapped_file import shown

# Far above any real model; keeps what is computed from a size (lists, products) small.
MAX_INTEGER = 1 << 31


class Fields:
    """Values by key, each checked for type and range. An absent key and null read as `default`.

    `prefix` is put before every key, in look-ups and in messages (GGUF: "llama."). Without a default
    a key is required. Raises `ModelFileError`, which names the file and the key.
    """

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path = path
        self._values = values
        self._prefix = prefix

    def get(self, key: str) -> Any:
        return self._values.get(self._prefix + key)

    def fail(self, key: str, expected: str) -> NoReturn:
        raise ModelFileError(self.path, f"{self._prefix + key} is {shown(self.get(key))}; it must be {expected}")

    def require(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ModelFileError(self.path, f"{self._prefix + key} is missing")
        return value

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_INTEGER) -> int:
        value = self._value(key, default)
        if type(value) is not int or not low <= value <= high:
            self.fail(key, f"an integer from {low} to {high}")
        return value

    def optional_integer(self, key: str, *, low: int = 1, high: int = MAX_INTEGER) -> int | None:
        return None if self.get(key) is None else self.integer(key, low=low, high=high)

    def number(self, key: str, default: float | None = None, *, positive: bool = True) -> float:
        value = self._value(key, default)
        if type(value) not in (int, float):
            self.fail(key, "a number")
        try:
            number = float(value)
        except OverflowError:
            self.fail(key, "a finite number")
        if not math.isfinite(number) or number < 0 or (positive and number == 0):
            self.fail(key, "a positive finite number" if positive else "a finite number, 0 or more")
        return number

    def optional_number(self, key: str, *, positive: bool = True) -> float | None:
        return None if self.get(key) is None else self.number(key, positive=positive)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if type(value) is not bool:
            self.fail(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            self.fail(key, "a string")
        return value

    def optional_text(self, key: str) -> str | None:
        return None if self.get(key) is None else self.text(key)

    def texts(self, key: str) -> list[str] | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fail(key, "a list of strings")
        return value

    def section(self, key: str) -> Mapping[str, Any] | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(key, "an object")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        return value if value is not None else default if default is not None else self.require(key)
