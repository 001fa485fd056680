"""What a command needs that the plain package does not bring."""

from __future__ import annotations

from importlib.util import find_spec

from pelton.core.errors import ConfigError


def require_aiohttp() -> None:
    if find_spec("aiohttp") is None:
        raise ConfigError("pelton bench needs aiohttp: pip install 'pelton[bench]'")
