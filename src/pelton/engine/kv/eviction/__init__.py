"""Which cached block is given up first, by name. A new method is one file and one row here."""

from __future__ import annotations

from collections.abc import Callable

from pelton.core.protocols import Clock
from pelton.engine.kv.block import EvictionPolicy
from pelton.engine.kv.eviction.lru import LRUEviction
from pelton.engine.kv.eviction.value import ValueEviction

# From a clock and the cost to compute block `index` of a chain again, in any unit.
EVICTIONS: dict[str, Callable[[Clock, Callable[[int], float]], EvictionPolicy]] = {
    "lru": lambda _clock, _cost: LRUEviction(),
    "value": ValueEviction,
}
