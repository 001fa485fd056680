"""How near a kernel comes to what the machine can do: measured ceilings, and the time that they leave at least.

The roofline of Williams, Waterman and Patterson (CACM 2009): a kernel takes at least the time of its bytes at
the memory's bandwidth, and of its operations at the arithmetic units' peak.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pelton.core.errors import ConfigError

MEMORY_CEILINGS = ("l2", "l3", "dram")  # nearest first


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """Bytes per second of a memory, or operations per second (a multiplication and an addition are two)."""

    name: str
    one_thread: float
    all_threads: float

    @property
    def is_memory(self) -> bool:
        return self.name in MEMORY_CEILINGS


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    num_threads: int
    dram_bytes: int  # read to measure "dram"
    l2_bytes: int  # of one core
    l3_bytes: int  # 0: none, or the system does not say
    ceilings: tuple[Ceiling, ...]

    def best(self, names: Sequence[str]) -> Ceiling:
        """The highest of those of `names` that this machine has. Raises `KeyError` where it has none."""
        found = [ceiling for ceiling in self.ceilings if ceiling.name in names]
        if not found:
            raise KeyError(f"no ceiling of {', '.join(names)} was measured")
        return max(found, key=lambda ceiling: ceiling.all_threads)

    def memory_of(self, num_bytes: float) -> Ceiling:
        """The nearest memory that holds what the kernel before has just written."""
        if num_bytes <= self.l2_bytes * self.num_threads:
            return self.best(("l2",))
        return self.best(("l3", "dram") if num_bytes <= self.l3_bytes / 2 else ("dram",))


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelBenchPlan:
    """Sizes to measure. `prefill_tokens` new tokens end at each context."""

    rows: tuple[int, ...] = (1, 4, 8, 16, 32, 64, 128, 512)
    contexts: tuple[int, ...] = (512, 4096)
    decode_requests: tuple[int, ...] = (1, 16, 64)
    prefill_tokens: int = 512
    budget_s: float = 0.5  # for one kernel at one size, or all products at one number of rows

    def __post_init__(self) -> None:
        for name in ("rows", "contexts", "decode_requests"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ConfigError(f"{name} must be one number or more, each at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelWork:
    """What one call of a kernel must do at least. `num_bytes` counts packed weights for products, keys and values
    for attention, and all that is read and written for the rest."""

    kernel: str
    detail: str  # formats, context: what tells it from others of its name
    num_rows: int
    num_ops: float
    num_bytes: float
    memory: Ceiling
    arithmetic: Ceiling | None = None  # None: too few operations to bind


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFigure:
    """`time_s`: the median call, of `num_calls`."""

    work: KernelWork
    time_s: float
    fastest_s: float
    num_calls: int

    @property
    def ops_per_s(self) -> float:
        return self.work.num_ops / self.time_s

    @property
    def bytes_per_s(self) -> float:
        return self.work.num_bytes / self.time_s

    @property
    def binding(self) -> Ceiling:
        """Which of the two ceilings asks for more time."""
        work = self.work
        if work.arithmetic is None or self._memory_s >= work.num_ops / work.arithmetic.all_threads:
            return work.memory
        return work.arithmetic

    @property
    def share(self) -> float:
        """Least possible time by time taken: 1 is the ceiling itself."""
        work = self.work
        arithmetic_s = 0.0 if work.arithmetic is None else work.num_ops / work.arithmetic.all_threads
        return max(self._memory_s, arithmetic_s) / self.time_s

    @property
    def _memory_s(self) -> float:
        return self.work.num_bytes / self.work.memory.all_threads


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelReport:
    isa: str
    num_threads: int
    ceilings: Ceilings
    figures: tuple[KernelFigure, ...]
    skipped: tuple[str, ...]  # what was not measured, and why


def make_figure(work: KernelWork, times_s: Sequence[float]) -> KernelFigure:
    """The first call warms up and is not counted."""
    counted = times_s[1:]
    return KernelFigure(work=work, time_s=statistics.median(counted), fastest_s=min(counted), num_calls=len(counted))
