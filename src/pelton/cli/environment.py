"""`pelton env`: the machine, the versions, and what Pelton would choose on them."""

from __future__ import annotations

import json
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

# What decides which kernels can run; other flags of the processor are left out.
_ISA_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
_PACKAGES = ("pelton", "torch", "numpy", "tokenizers", "fastapi", "uvicorn", "pyzmq", "msgspec")


def env(
    *, as_json: Annotated[bool, Parameter(name="--json", negative=(), help="print one JSON document")] = False
) -> int:
    """Show machine, versions and what Pelton would use."""
    description = {**describe_machine(), **_describe_worker()}
    if as_json:
        print(json.dumps(description, indent=1))
        return 0
    width = max(len(name) for name in description)
    for name, value in description.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        text = " ".join(text) if isinstance(text, list) else text
        print(f"{name:<{width}}  {text}")
    return 0


def describe_machine() -> dict[str, Any]:
    """What a reader of a measurement must know. No host name, user or path."""
    return {
        "processor": _processor(),
        "isa": _isa(),
        "cores": num_usable_cores(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _describe_worker() -> dict[str, Any]:
    from pelton.build import describe_worker
    from pelton.cli.settings import resolve_settings
    from pelton.core.errors import ConfigError

    try:
        return describe_worker(resolve_settings({}, os.environ).worker)
    except ConfigError as error:
        return {"kernel_backend": f"none: {error}"}


def num_usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return match.group(1) if match else platform.processor() or platform.machine()


def _isa() -> list[str]:
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    present = set(match.group(1).split()) if match else set()
    return [flag for flag in _ISA_FLAGS if flag in present]


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
