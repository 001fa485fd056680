"""Which cached block is given up first, by name. A new method is one file and one row here."""

from __future__ import annotations

from collections.abc import Callable

from pelton.core.protocols import Clock
from pelton.engine.kv.block import EvictionPolicy
from pelton.engine.kv.eviction.lru import LRUEviction

EVICTIONS: dict[str, Callable[[Clock], EvictionPolicy]] = {
    "lru": lambda _: LRUEviction(),
}
