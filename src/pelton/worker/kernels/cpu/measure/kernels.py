"""What each native kernel reaches on the shapes of a real model, beside what the machine gives at most.

Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable

from pelton.bench.roofline import Ceiling, Ceilings, KernelBenchPlan, KernelFigure, KernelReport
from pelton.core.errors import ConfigError
from pelton.weights.tensors import ModelFiles
from pelton.worker.kernels.cpu import pelton_cpu
from pelton.worker.kernels.cpu.measure.attention import AttentionBench
from pelton.worker.kernels.cpu.measure.elementwise import ElementwiseBench
from pelton.worker.kernels.cpu.measure.products import ORDER, ProductBench, load_matrices
from pelton.worker.kernels.cpu.measure.setup import Setup


def make_runtime(isa: str | None, num_threads: int) -> pelton_cpu.Runtime:
    """Raises `ConfigError` for an instruction set that does not run here."""
    try:
        return pelton_cpu.Runtime(isa, num_threads, [])
    except ValueError as error:
        raise ConfigError(f"isa {isa!r}: {error}") from error


def measure_ceilings(num_threads: int, num_free_bytes: int) -> Ceilings:
    """Some 4 s. `num_free_bytes` bounds the memory that is read, which the ceiling of "dram" then flatters."""
    dram_bytes = min(pelton_cpu.dram_buffer_bytes(), num_free_bytes // 4)
    measured = pelton_cpu.measure_ceilings(num_threads, dram_bytes)
    return Ceilings(
        num_threads=num_threads,
        dram_bytes=dram_bytes,
        l2_bytes=pelton_cpu.l2_cache_bytes(),
        l3_bytes=pelton_cpu.l3_cache_bytes(),
        ceilings=tuple(Ceiling(name=name, one_thread=one, all_threads=all_) for name, one, all_ in measured),
    )


def measure_kernels(
    files: ModelFiles,
    runtime: pelton_cpu.Runtime,
    ceilings: Ceilings,
    plan: KernelBenchPlan,
    on_progress: Callable[[str], None],
) -> KernelReport:
    """Every kernel on the shapes and weights of `files`."""
    setup = Setup(files.spec, runtime, ceilings, plan)
    on_progress("packing weights")
    matrices, skipped = load_matrices(files, runtime)
    products = ProductBench(setup, matrices)
    figures: list[KernelFigure] = []
    for num_rows in plan.rows:
        on_progress(f"products, {num_rows} rows")
        figures += products.figures(num_rows)
    del matrices, products
    on_progress("attention")
    figures += AttentionBench(setup).figures()
    elementwise = ElementwiseBench(setup)
    for num_rows in plan.rows:
        on_progress(f"elementwise kernels, {num_rows} rows")
        figures += elementwise.figures(num_rows)
    names = list(dict.fromkeys([*ORDER, *(figure.work.kernel for figure in figures)]))
    figures.sort(key=lambda figure: names.index(figure.work.kernel))
    return KernelReport(
        isa=runtime.isa,
        num_threads=runtime.num_threads,
        ceilings=ceilings,
        figures=tuple(figures),
        skipped=tuple(skipped),
    )
