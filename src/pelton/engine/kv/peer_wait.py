"""`PeerWait`: a new request whose KV another engine may have waits for it before it is scheduled, within bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from pelton.core.batch import BlockKey
from pelton.core.protocols import Clock
from pelton.core.request import Request
from pelton.engine.kv.manager import KVManager
from pelton.engine.kv.read_ahead import MIN_WAIT_S
from pelton.engine.kv.transfer import FETCH_BLOCKS, PEER, KVTransfer

# How often peers are asked although it would not pay at the speed seen so far, which is not known at first and changes.
MEASURE_EVERY_S = 10.0


@dataclass(slots=True)
class _Held:
    request: Request
    hashes: Sequence[bytes]  # of its full blocks
    places: dict[BlockKey, int]  # of what it wants of them, in the chain
    unasked: dict[BlockKey, int]  # of that, what waits for room in the inbox
    until_s: float
    coming: list[BlockKey] = field(default_factory=list)


class PeerWait:
    """Whether the other engine has the blocks is not known before it has answered; it is asked once a request."""

    def __init__(self, kv: KVManager, transfer: KVTransfer, clock: Clock) -> None:
        self._kv = kv
        self._transfer = transfer
        self._clock = clock
        self._held: dict[str, _Held] = {}
        self._measure_at_s = -math.inf
        transfer.on_missed = self._give_up

    def __len__(self) -> int:
        return len(self._held)

    def try_hold(self, request: Request) -> bool:
        """Ask for what `request` can use; False: there is nobody to ask, or it would not pay."""
        kv = self._kv
        if not self._transfer.can_fetch or not kv.enable_prefix_caching:
            return False
        if request.sampling.prompt_logprobs is not None or request.sampling.pooling is not None:
            return False  # all of its prompt may have to be computed
        kv.prepare(request)
        hashes = request.block_hashes[: (request.num_known_tokens - 1) // kv.block_size]
        start = kv.prefixes.num_known_tokens(hashes, self._is_near)
        end = len(hashes) * kv.block_size
        places = kv.prefixes.visible_keys(hashes)
        missing = self._missing(places)
        costs = self._transfer.costs
        compute_s = costs.recompute_s(start, end)
        if not missing:
            return False
        if costs.load_s(PEER, len(missing) * kv.block_size // len(kv.groups)) >= compute_s:
            self._measure(missing)
            return False
        held = _Held(request, hashes, places, missing, self._clock.now_s() + max(MIN_WAIT_S, compute_s))
        self._held[request.request_id] = held
        return self._goes_on(held) or self._held.pop(request.request_id) is None

    def _missing(self, places: Mapping[BlockKey, int]) -> dict[BlockKey, int]:
        return {key: place for key, place in places.items() if not self._is_near(key)}

    def _measure(self, places: Mapping[BlockKey, int]) -> None:
        """Ask for the first blocks, for nobody to wait for."""
        now_s = self._clock.now_s()
        if now_s >= self._measure_at_s:
            self._measure_at_s = now_s + MEASURE_EVERY_S
            self._transfer.fetch(dict(islice(places.items(), FETCH_BLOCKS)))

    def _is_near(self, key: BlockKey) -> bool:
        tiers = self._kv.tiers
        return self._kv.pool.find(key) is not None or (tiers is not None and tiers.find(key) is not None)

    def _goes_on(self, held: _Held) -> bool:
        """Whether something that it wants is on its way, or has to wait for a place. No block is asked for twice."""
        transfer = self._transfer
        if not transfer.can_fetch:
            held.unasked = {}
        elif held.unasked and transfer.has_room:
            transfer.fetch(held.unasked)
            held.coming += filter(transfer.is_fetching, held.unasked)
            held.unasked = {
                key: place
                for key, place in held.unasked.items()
                if not transfer.is_fetching(key) and not self._is_near(key)
            }
        held.coming = list(filter(transfer.is_fetching, held.coming))
        return bool(held.unasked or held.coming)

    def _give_up(self, keys: Sequence[BlockKey]) -> None:
        """What follows a block that cannot be had is of no use, but what a window sees from just before it is."""
        groups = self._kv.groups
        for held in self._held.values():
            if not any(key in held.unasked or key in held.coming for key in keys):
                continue
            held.unasked = {}
            ends = [held.places[key] for key in keys if key in held.places and groups[key[0]].sliding_window is None]
            if ends and any(group.sliding_window is not None for group in groups):
                held.places = self._kv.prefixes.visible_keys(held.hashes[: min(ends)])
                held.unasked = self._missing(held.places)

    def take_ready(self) -> list[Request]:
        """Requests that need not wait any more, in order of arrival."""
        self._transfer.poll()
        if not self._held:
            return []
        now_s = self._clock.now_s()
        ready = [held for held in self._held.values() if held.until_s <= now_s or not self._goes_on(held)]
        for held in ready:
            del self._held[held.request.request_id]
        return [held.request for held in ready]

    def drop(self, request: Request) -> None:
        """The request has ended; what is on its way stays useful to others."""
        self._held.pop(request.request_id, None)

    @property
    def next_deadline_s(self) -> float | None:
        return min((held.until_s for held in self._held.values()), default=None)
