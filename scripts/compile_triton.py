"""Compile Triton kernels for a GPU that is not there, and say what the assembler made of them.

    python scripts/compile_triton.py              every kernel, for an H100 (sm_90)
    python scripts/compile_triton.py float32      the cases whose name contains this

The launches of the real code run on CPU tensors of real sizes, but compile instead of launching: `ptxas` and
`cuobjdump` come with Triton. A row for each kernel: registers, bytes spilled to local memory, shared memory, and how
many matrix instructions of Hopper (`wgmma`) and of Ampere (`mma`) it has. Nothing is run or timed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.gpu.compile_only import compile_only

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Compiled:
    label: str
    kernel: str
    num_registers: int
    num_spilled_bytes: int
    num_shared_bytes: int
    num_wgmma: int
    num_mma: int
    hash: str
    shapes: frozenset[str]  # of `wgmma`, the number of rows (n) left out, and of `mma`


class Compiler:
    """Within `collect`, launches compile."""

    def __init__(self) -> None:
        self._kernels: list[Any] = []
        compile_only(lambda kernel: self._kernels.append(kernel))

    def collect(self, label: str, launch: Callable[[], object]) -> list[Compiled]:
        self._kernels.clear()
        launch()
        seen: dict[str, Compiled] = {}
        for kernel in self._kernels:
            seen.setdefault(kernel.hash, _inspect(label, kernel))
        return list(seen.values())


def _inspect(label: str, kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    local = re.search(r"LOCAL:(\d+)", usage)
    ptx = kernel.asm["ptx"]
    return Compiled(
        label,
        kernel.metadata.name,
        int(registers[1]) if registers else 0,
        (int(stack[1]) if stack else 0) + (int(local[1]) if local else 0),
        kernel.metadata.shared,
        ptx.count("wgmma.mma_async"),
        len(re.findall(r"\bmma\.sync", ptx)),
        kernel.hash,
        instruction_shapes(ptx),
    )


def instruction_shapes(ptx: str) -> frozenset[str]:
    """What sums up within a matrix instruction: its outputs and inputs at a time, and its types."""
    found = re.findall(r"wgmma\.mma_async\S*?\.(m\d+)n\d+(k\d+)(\S*)", ptx)
    return frozenset({"".join(each) for each in found} | set(re.findall(r"\bmma\.sync\S*", ptx)))


def differing(rows: Iterable[Compiled]) -> list[str]:
    """Kernels that go through other matrix instructions with other numbers of rows: law 3 would not hold."""
    by_name: dict[str, set[frozenset[str]]] = {}
    for row in rows:
        if row.shapes:
            by_name.setdefault(re.sub(r", (\d+ rows|decode|prefill)", "", row.label), set()).add(row.shapes)
    return [name for name, shapes in by_name.items() if len(shapes) > 1]


def main() -> int:
    from benchmarks.gpu.compile_cases import cases

    compiler = Compiler()
    print(f"{'case':<34} {'kernel':<26} {'regs':>5} {'spill':>6} {'shared':>7} {'wgmma':>6} {'mma':>5}")
    num_failed, compiled = 0, list[Compiled]()
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    for label, launch in cases():
        if wanted not in label:
            continue
        try:
            for row in compiler.collect(label, launch):
                compiled.append(row)
                print(
                    f"{row.label:<34} {row.kernel:<26} {row.num_registers:>5} {row.num_spilled_bytes:>6} "
                    f"{row.num_shared_bytes:>7} {row.num_wgmma:>6} {row.num_mma:>5}",
                    flush=True,
                )
        except Exception as error:
            num_failed += 1
            print(f"{label:<34} failed: {type(error).__name__}: {str(error)[:2000]}", flush=True)
    for name in differing(compiled):
        num_failed += 1
        print(f"{name}: other matrix instructions with other numbers of rows")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
