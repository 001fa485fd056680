"""By value: what saves least work for the memory and time it would still take is given up first.

Blocks that were given back together (the end of a chain before its beginning) make a chain. How long chains
lie until they are asked for again is observed, by how many turns they have had. From that follows the best rate
of return of a chain that has lain for so long: over all spans that it may be kept on, the chance that it is found,
over the time it is held (the index of Gittins; hit density in LHD, NSDI 2018). Times the cost to recompute its
last block this is its value. The least valuable of a few chains gives up its last block.

What has been given up is remembered for a while by hash alone, so that the times learnt are those of the traffic
and not of the cache.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Callable

from pelton.core.batch import BlockKey
from pelton.core.protocols import Clock
from pelton.engine.kv.block import Block

# Classes: 0, 1, 2, 3 or more turns before.
NUM_CLASSES = 4
# Ages fall into bins that double: up to 0.25 s, 0.5 s, ... 2^19 s (six days).
NUM_AGES = 22
_SHORTEST_S = 0.25
_NUM_SAMPLES = 12
# One block in so many is observed.
_OBSERVED = 4
# Observed blocks that are remembered after they were given up; what is not asked for until then is lost.
_MAX_GHOSTS = 16384
# After so many ends of a stay those before count half; values are made anew far more often.
_HALF_LIFE_ENDS = 65536
_REFRESH_ENDS = 64
_PRIOR = 0.5


class ReturnTimes:
    """How long blocks of one class lay until they were asked for, and how many were not."""

    def __init__(self, num_turns: int) -> None:
        # Before anything is known: the more turns the likelier, the sooner the likelier.
        self.found = [_PRIOR * (num_turns + 1) / 2**age for age in range(NUM_AGES)]
        self.lost = [_PRIOR] * NUM_AGES
        self.rates = self.best_rates()

    def best_rates(self) -> list[float]:
        """By age: the best chance to be found over the seconds held, among all spans to keep it."""
        num_ends = [found + lost for found, lost in zip(self.found, self.lost, strict=True)]
        num_left = [0.0] * (NUM_AGES + 1)
        for age in reversed(range(NUM_AGES)):
            num_left[age] = num_left[age + 1] + num_ends[age]
        rates = []
        for start in range(NUM_AGES):
            best = chance = held_s = 0.0
            survival = 1.0
            for age in range(start, NUM_AGES):
                hazard = self.found[age] / num_left[age]
                chance += survival * hazard
                held_s += survival * (1 - hazard / 2) * _SHORTEST_S * 2.0 ** max(0, age - 1)
                survival *= 1 - hazard
                best = max(best, chance / held_s)
            rates.append(best)
        return rates

    def rate(self, age_s: float) -> float:
        """`best_rates` between the middles of two bins, in proportion."""
        place = max(0.0, math.log2(max(age_s, _SHORTEST_S) / _SHORTEST_S) + 0.5)
        low = min(int(place), NUM_AGES - 1)
        high = min(low + 1, NUM_AGES - 1)
        return self.rates[low] + (self.rates[high] - self.rates[low]) * (place - int(place))

    def fade(self) -> None:
        self.found = [count / 2 for count in self.found]
        self.lost = [count / 2 for count in self.lost]


class _Chain:
    """Blocks given back together; the first to go is the last one."""

    __slots__ = ("blocks", "last_index", "place", "rank", "time_s")

    def __init__(self, rank: int, time_s: float, place: int) -> None:
        self.rank = rank
        self.time_s = time_s
        self.place = place  # in the list of chains
        self.last_index = 0
        self.blocks: OrderedDict[int, Block] = OrderedDict()


class ValueEviction:
    """`cost_s(index)` is what it takes to compute block `index` of a chain again, in any unit."""

    def __init__(self, clock: Clock, cost_s: Callable[[int], float]) -> None:
        self._clock = clock
        self._cost_s = cost_s
        self._times = [ReturnTimes(num_turns) for num_turns in range(NUM_CLASSES)]
        self._chains: list[_Chain] = []
        self._by_age: OrderedDict[int, _Chain] = OrderedDict()  # by identity, oldest first
        self._chain_of: dict[int, _Chain] = {}
        self._ghosts: OrderedDict[BlockKey, tuple[int, float]] = OrderedDict()  # -> class, when last used
        self._latest: _Chain | None = None
        self._num_ends = 0
        self._random = random.Random(0)  # which chains are compared, nothing that a client sees

    def add(self, block: Block) -> None:
        now_s = self._clock.now_s()
        rank = min(block.num_turns, NUM_CLASSES - 1)
        ghost = self._ghosts.pop(block.key, None) if block.key is not None else None
        if ghost is not None:
            self._observe(ghost[0], now_s - ghost[1], is_found=True)
        block.last_used_s = now_s
        chain = self._latest
        if chain is None or not chain.blocks or (chain.time_s, chain.last_index) != (now_s, block.index + 1):
            chain = self._latest = _Chain(rank, now_s, len(self._chains))
            self._chains.append(chain)
            self._by_age[id(chain)] = chain
        chain.last_index = block.index
        chain.blocks[block.block_id] = block
        self._chain_of[block.block_id] = chain

    def reuse(self, block: Block) -> None:
        chain = self._remove(block)
        if _is_observed(block):
            self._observe(chain.rank, self._clock.now_s() - chain.time_s, is_found=True)

    def discard(self, block: Block) -> None:
        self._remove(block)

    def pop(self) -> Block:
        now_s = self._clock.now_s()
        candidates = [next(iter(self._by_age.values()))]
        candidates += [self._random.choice(self._chains) for _ in range(min(_NUM_SAMPLES, len(self._chains) - 1))]
        chain = min(candidates, key=lambda each: self._value(each, now_s))
        block = next(iter(chain.blocks.values()))
        self._remove(block)
        if _is_observed(block) and block.key is not None:
            self._ghosts[block.key] = (chain.rank, chain.time_s)
            if len(self._ghosts) > _MAX_GHOSTS:
                _, (rank, time_s) = self._ghosts.popitem(last=False)
                self._observe(rank, now_s - time_s, is_found=False)
        return block

    def _value(self, chain: _Chain, now_s: float) -> tuple[float, float]:
        index = next(iter(chain.blocks.values())).index
        return self._times[chain.rank].rate(now_s - chain.time_s) * self._cost_s(index), chain.time_s

    def _remove(self, block: Block) -> _Chain:
        chain = self._chain_of.pop(block.block_id)
        del chain.blocks[block.block_id]
        if not chain.blocks:
            del self._by_age[id(chain)]
            last = self._chains.pop()
            if last is not chain:
                self._chains[chain.place] = last
                last.place = chain.place
        return chain

    def _observe(self, rank: int, age_s: float, *, is_found: bool) -> None:
        times = self._times[rank]
        counts = times.found if is_found else times.lost
        counts[_age(age_s)] += 1
        self._num_ends += 1
        if self._num_ends % _HALF_LIFE_ENDS == 0:
            for each in self._times:
                each.fade()
        if self._num_ends % _REFRESH_ENDS == 0:
            for each in self._times:
                each.rates = each.best_rates()

    def __len__(self) -> int:
        return len(self._chain_of)

    def __contains__(self, block_id: object) -> bool:
        return block_id in self._chain_of


def _age(age_s: float) -> int:
    return min(int(age_s / _SHORTEST_S).bit_length(), NUM_AGES - 1)


def _is_observed(block: Block) -> bool:
    return block.key is not None and block.key[1][-1] % _OBSERVED == 0
