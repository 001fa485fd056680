"""Compile Triton kernels for a GPU that is not there, and say what the assembler made of them.

    python scripts/compile_triton.py          products, MoE, LoRA, sampling, for an H100 (sm_90)

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

_H100 = GPUTarget("cuda", 90, 32)
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


class _AbsentDevice:
    """Enough of a driver to compile for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return _H100


class Compiler:
    """Within `collect`, launches compile."""

    def __init__(self) -> None:
        driver.set_active(_AbsentDevice())
        self._kernels: list[tuple[str, Any]] = []
        self._label = ""
        run = JITFunction.run

        def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            del warmup
            kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
            self._kernels.append((self._label, kernel))
            return kernel

        JITFunction.run = compile_only

    def collect(self, label: str, launch: Callable[[], object]) -> list[Compiled]:
        self._label, self._kernels = label, []
        launch()
        seen: dict[str, Compiled] = {}
        for _, kernel in self._kernels:
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
    )


def main() -> int:
    from benchmarks.gpu.compile_cases import cases

    compiler = Compiler()
    print(f"{'case':<34} {'kernel':<26} {'regs':>5} {'spill':>6} {'shared':>7} {'wgmma':>6} {'mma':>5}")
    num_failed = 0
    for label, launch in cases():
        try:
            for row in compiler.collect(label, launch):
                print(
                    f"{row.label:<34} {row.kernel:<26} {row.num_registers:>5} {row.num_spilled_bytes:>6} "
                    f"{row.num_shared_bytes:>7} {row.num_wgmma:>6} {row.num_mma:>5}",
                    flush=True,
                )
        except Exception as error:
            num_failed += 1
            print(f"{label:<34} failed: {type(error).__name__}: {str(error)[:2000]}", flush=True)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.exit(main())
