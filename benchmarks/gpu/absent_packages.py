"""Runs the engine where nothing can be installed: stands in for the one package that it imports and a GPU machine may
lack. `msgspec` is for messages between processes, of which there are none here: its structs are dataclasses."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any


class _Struct:
    def __init_subclass__(cls, *, frozen: bool = False, **options: Any) -> None:
        del options
        dataclasses.dataclass(frozen=frozen)(cls)


class _Codec:
    def __init__(self, *args: Any) -> None:
        del args


def stand_in() -> None:
    """Before anything of pelton is imported. Does nothing for what is there."""
    if find_spec("msgspec") is None:
        module: Any = ModuleType("msgspec")
        module.Struct = _Struct
        module.msgpack = SimpleNamespace(Encoder=_Codec, Decoder=_Codec)
        sys.modules["msgspec"] = module
    try:
        importlib.metadata.version("pelton")
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version
        importlib.metadata.version = lambda name: "0+checkout" if name == "pelton" else version(name)
