"""What this process may use of the machine: cores and memory, seen through affinity and control groups.

A container's limits show neither in the machine's core count nor in its free memory; a pool sized by
those is throttled or killed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_CGROUP_ROOT = Path("/sys/fs/cgroup")


def num_available_cores(cgroup_root: Path = _CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")) -> int:
    """Cores by affinity, or fewer where a CPU quota allows less; at least 1."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _cgroup_folders(cgroup_root, membership, "cpu"):
        quota, period = _read_words(folder / "cpu.max"), "100000"
        if len(quota) == 2:
            period = quota[1]
        else:
            quota = _read_words(folder / "cpu.cfs_quota_us")
            period = next(iter(_read_words(folder / "cpu.cfs_period_us")), period)
        if quota and quota[0].isdecimal() and int(period) > 0:
            num_cores = min(num_cores, round(int(quota[0]) / int(period)))
    return max(1, num_cores)


def num_available_memory_bytes(
    cgroup_root: Path = _CGROUP_ROOT,
    membership: Path = Path("/proc/self/cgroup"),
    meminfo: Path = Path("/proc/meminfo"),
) -> int:
    """Bytes that can still be allocated without swapping or hitting a limit; page cache counts as free."""
    lines = (line.split() for line in _read_text(meminfo).splitlines())
    available = next((int(words[1]) * 1024 for words in lines if words and words[0] == "MemAvailable:"), None)
    if available is None:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder in _cgroup_folders(cgroup_root, membership, "memory"):
        for limit_name, usage_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, usage = _read_words(folder / limit_name), _read_words(folder / usage_name)
            if limit and usage and limit[0].isdecimal():
                stat = _read_words(folder / "memory.stat")
                cached = int(stat[stat.index(cache_name) + 1]) if cache_name in stat else 0
                available = min(available, int(limit[0]) - int(usage[0]) + cached)
    return max(0, available)


def _cgroup_folders(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """The process's groups from its own up to the root, for version 2 and for version 1's `controller`."""
    for line in _read_text(membership).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        folder = base / path.lstrip("/")
        # Inside a container the path may be the host's, and only the root is mounted.
        yield from (base / parent for parent in (folder, *folder.parents) if parent.is_relative_to(base))


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _read_words(path: Path) -> list[str]:
    return _read_text(path).split()
