"""`ReadAhead`: a new request whose KV is on disk waits for it before it is scheduled, within bounds (law 8)."""

from __future__ import annotations

from dataclasses import dataclass

from pelton.core.batch import BlockKey
from pelton.core.protocols import Clock
from pelton.core.request import Request
from pelton.engine.kv.disk import DISK, DiskTier
from pelton.engine.kv.manager import KVManager
from pelton.engine.kv.tiers import HOST

# However short the computing would be: a read that is as slow as this is not worth a second thought.
MIN_WAIT_S = 0.05


@dataclass(slots=True)
class _Held:
    request: Request
    keys: list[BlockKey]
    until_s: float


class ReadAhead:
    """Outside of `schedule()`: what is not there in time is computed, as if it had never been on disk."""

    def __init__(self, kv: KVManager, clock: Clock) -> None:
        self._kv = kv
        self._clock = clock
        self._held: dict[str, _Held] = {}

    @property
    def _disk(self) -> DiskTier | None:
        return self._kv.tiers.disk if self._kv.tiers is not None else None

    def __len__(self) -> int:
        return len(self._held)

    def try_hold(self, request: Request) -> bool:
        """Start to read what `request` can use; False: nothing, or nothing that pays."""
        disk = self._disk
        if disk is None or not self._kv.enable_prefix_caching or request.sampling.prompt_logprobs is not None:
            return False
        self._kv.prepare(request)
        plan = self._plan(request, disk)
        if plan is None:
            return False
        places, wait_s = plan
        disk.read(places)
        if not disk.is_reading(places):
            return False
        self._held[request.request_id] = _Held(request, list(places), self._clock.now_s() + wait_s)
        return True

    def _plan(self, request: Request, disk: DiskTier) -> tuple[dict[BlockKey, int], float] | None:
        """Blocks to read, with their places, and how long to wait for them: as long as computing would take."""
        kv, tiers = self._kv, self._kv.tiers
        assert tiers is not None
        hashes = request.block_hashes[: (request.num_known_tokens - 1) // kv.block_size]

        def is_near(key: BlockKey) -> bool:
            return kv.pool.find(key) is not None or tiers.find(key) is not None

        start = kv.prefixes.num_known_tokens(hashes, is_near)
        end = kv.prefixes.num_known_tokens(hashes, lambda key: key in disk or is_near(key) or disk.is_reading((key,)))
        if end <= start:
            return None
        visible = kv.prefixes.visible_keys(hashes[: end // kv.block_size])
        places = {key: place for key, place in visible.items() if not is_near(key)}
        compute_s = tiers.costs.recompute_s(start, end)
        num_tokens = len(places) * kv.block_size // len(kv.groups)
        if tiers.costs.load_s(DISK, num_tokens) + tiers.costs.load_s(HOST, num_tokens) >= compute_s:
            return None
        return places, max(MIN_WAIT_S, compute_s)

    def take_ready(self) -> list[Request]:
        """Requests that need not wait any more, in order of arrival."""
        disk = self._disk
        if disk is None:
            return []
        disk.poll()
        if not self._held:
            return []
        now_s = self._clock.now_s()
        ready = [held for held in self._held.values() if held.until_s <= now_s or not disk.is_reading(held.keys)]
        for held in ready:
            del self._held[held.request.request_id]
        return [held.request for held in ready]

    def drop(self, request: Request) -> None:
        """The request has ended; what is being read stays useful to others."""
        self._held.pop(request.request_id, None)

    @property
    def next_deadline_s(self) -> float | None:
        return min((held.until_s for held in self._held.values()), default=None)
