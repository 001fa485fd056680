"""Runs a program that a model wrote: in a process of its own, with little of everything, and no network.

Limits on time, memory, file sizes and processes; a folder of its own that is removed afterwards; no environment;
where the system lets it, a network and user namespace of its own. This stops accidents, not a determined attacker:
the program can still read what this user can read. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

MEMORY_BYTES = 2 << 30
FILE_BYTES = 1 << 20
NUM_PROCESSES = 64
OUTPUT_BYTES = 4000
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000


def run_program(source: str, timeout_s: float) -> str | None:
    """None where the program ends with 0, else why it did not: "timeout", or the last line that it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(source, encoding="utf-8")
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", path.name],
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "HOME": folder},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: _confine(timeout_s),
            )
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                return "timeout"
            finally:
                _end(process)
        if code == 0:
            return None
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return "timeout"
        lines = log.read_bytes()[-OUTPUT_BYTES:].decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), f"exit code {code}")


def _confine(timeout_s: float) -> None:
    cpu_s = int(timeout_s) + 1
    for limit, value in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    # May be refused, in a container for instance; the limit on processes counts for other than root only.
    ctypes.CDLL(None).unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    resource.setrlimit(resource.RLIMIT_NPROC, (NUM_PROCESSES, NUM_PROCESSES))


def _end(process: subprocess.Popen[bytes]) -> None:
    """The program and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
