"""Runs the engine where nothing can be installed: stands in for the one package that it imports and a GPU machine may
lack. `msgspec` is for messages between processes: its structs are dataclasses, messages what `repr` writes."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

_MESSAGE = "message"
_structs: dict[str, Any] = {}


class _Struct:
    def __init_subclass__(cls, *, frozen: bool = False, **options: Any) -> None:
        del options
        dataclasses.dataclass(frozen=frozen)(cls)
        _structs[cls.__name__] = cls


class _Codec:
    """Of numbers, bytes, tuples and structs."""

    def __init__(self, *args: Any) -> None:
        del args

    def encode(self, message: Any) -> bytes:
        return repr(_plain(message)).encode()

    def decode(self, data: bytes) -> Any:
        return _whole(ast.literal_eval(data.decode()))


def _plain(value: Any) -> Any:
    if isinstance(value, _Struct):
        fields: Any = dataclasses.fields(value)  # type: ignore[arg-type]
        return (_MESSAGE, type(value).__name__, *(_plain(getattr(value, field.name)) for field in fields))
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def _whole(value: Any) -> Any:
    if isinstance(value, tuple) and value[:1] == (_MESSAGE,):
        return _structs[value[1]](*map(_whole, value[2:]))
    return tuple(map(_whole, value)) if isinstance(value, tuple) else value


def stand_in() -> None:
    """Before anything of pelton is imported. Does nothing for what is there."""
    if find_spec("msgspec") is None:
        module: Any = ModuleType("msgspec")
        module.Struct = _Struct
        module.msgpack = SimpleNamespace(Encoder=_Codec, Decoder=_Codec)
        module.DecodeError = ValueError
        sys.modules["msgspec"] = module
    try:
        importlib.metadata.version("pelton")
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version
        importlib.metadata.version = lambda name: "0+checkout" if name == "pelton" else version(name)
