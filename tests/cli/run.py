"""Runs the real command in a process of its own."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass


@dataclass
class Result:
    code: int
    out: str
    err: str


async def pelton(*arguments: str, stdin: str = "", **environment: str) -> Result:
    """`pelton ARGUMENTS` with no `PELTON_*` variables but those given."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "pelton.cli.main",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean_environment() | environment,
    )
    async with asyncio.timeout(180):
        out, err = await process.communicate(stdin.encode())
    assert process.returncode is not None
    return Result(process.returncode, out.decode(), err.decode())


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PELTON_")}
