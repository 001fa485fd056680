"""`pelton bench kernels` and `pelton bench step`: what each native kernel reaches, and where a step's time goes."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from pelton.cli.pull import pull_model
from pelton.cli.settings import resolve_settings
from pelton.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from pelton.bench.roofline import Ceiling, Ceilings, KernelFigure, KernelReport
    from pelton.bench.step_profile import StepProfile
    from pelton.build import PeltonConfig

ModelFlag = Annotated[str | None, Parameter(help="whose shapes and weights; default: the default model")]
ThreadsFlag = Annotated[int | None, Parameter(help="default: the cores that this process may use")]
IsaFlag = Annotated[str | None, Parameter(help="force an instruction set, such as avx2; default: the fastest")]
QuantizationFlag = Annotated[str | None, Parameter(help="round the weights as they are loaded, such as w4a8")]
ActivationFlag = Annotated[str | None, Parameter(help="of products: auto, int8, bfloat16 or float32")]
JsonFlag = Annotated[Path | None, Parameter(name="--json", help="also write all of it to a file")]


def kernels(
    model: ModelFlag = None,
    *,
    threads: ThreadsFlag = None,
    isa: IsaFlag = None,
    rows: Annotated[str, Parameter(help="rows of products and elementwise kernels")] = "1,4,8,16,32,64,128,512",
    contexts: Annotated[str, Parameter(help="positions that attention sees")] = "512,4096",
    json_file: JsonFlag = None,
) -> int:
    """Measure every native kernel and the machine's own ceilings, about a minute."""
    from rich.console import Console

    from pelton.bench.roofline import KernelBenchPlan
    from pelton.build import measure_kernels

    plan = KernelBenchPlan(rows=_numbers("rows", rows), contexts=_numbers("contexts", contexts))
    config = _resolve(model, threads)
    status = Console(stderr=True)
    with status.status("") as line:
        report = measure_kernels(config, plan, isa, line.update if status.is_terminal else _ignore)
    if json_file is not None:
        _write_json(json_file, _document(report, config.model.model))
    # A table squeezed into a narrow terminal, or a pipe's 80 columns, loses figures.
    _print_report(Console(width=1000, highlight=False), report)
    return 0


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class StepFlags:
    """Which steps are profiled."""

    decode: Annotated[str, Parameter(help="requests of decode steps")] = "1,16,32,64"
    prefill: Annotated[str, Parameter(help="tokens of prompts")] = "512"
    context: Annotated[int, Parameter(help="tokens before the one that is decoded")] = 256


def step(
    model: ModelFlag = None,
    *,
    threads: ThreadsFlag = None,
    isa: IsaFlag = None,
    quantization: QuantizationFlag = None,
    activation_dtype: ActivationFlag = None,
    steps: StepFlags = StepFlags(),
    json_file: JsonFlag = None,
) -> int:
    """Show where every millisecond of a model's step goes, op by op, without server and scheduler."""
    from rich.console import Console

    from pelton.bench.step_profile import StepProfilePlan
    from pelton.build import profile_steps

    plan = StepProfilePlan(
        decode=_numbers("decode", steps.decode), prefill=_numbers("prefill", steps.prefill), context=steps.context
    )
    config = _resolve(model, threads, quantization=quantization, activation_dtype=activation_dtype)
    status = Console(stderr=True)
    with status.status("") as line:
        name, profiles = profile_steps(config, plan, isa, line.update if status.is_terminal else _ignore)
    if json_file is not None:
        rounding = {"quantization": config.model.quantization, "activation_dtype": config.worker.activation_dtype}
        document = {"model": Path(config.model.model).name, "kernels": name, **rounding, "context": plan.context}
        _write_json(json_file, {**document, "steps": [asdict(profile) for profile in profiles]})
    console = Console(width=1000, highlight=False)
    console.print(f"kernels: {name}")
    for profile in profiles:
        _print_profile(console, profile)
    return 0


def _resolve(model: str | None, threads: int | None, **others: str | None) -> PeltonConfig:
    """Settings with a model that is on disk."""
    given = {"model": model, "threads": threads, **others}
    config = resolve_settings({name: value for name, value in given.items() if value is not None}, os.environ)
    pull_model(config.model)
    return config


def _print_profile(console: Console, profile: StepProfile) -> None:
    from rich.table import Table

    size = f"{profile.num_requests} requests" if profile.num_requests > 1 else f"{profile.num_tokens} tokens"
    size = "1 request" if profile.num_tokens == 1 else size
    title = f"{profile.name}, {size}: {1e3 * profile.time_s:.2f} ms (fastest {1e3 * profile.fastest_s:.2f} ms"
    console.print(f"\n[bold]{title}, {profile.num_steps} steps)")
    table = Table(box=None)
    for heading in ("", "calls", "ms", "share"):
        table.add_column(heading, justify="right" if heading else "left")
    for part in profile.parts:
        share = f"{100 * part.time_s / profile.time_s:.1f}%"
        table.add_row(part.name, f"{part.num_calls}", f"{1e3 * part.time_s:.3f}", share)
    console.print(table)


def _ignore(_: str) -> None: ...


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--{name} {text!r} is not a list of whole numbers, such as 1,16,512") from None


def _print_report(console: Console, report: KernelReport) -> None:
    from rich.table import Table

    ceilings = report.ceilings
    table = Table(box=None, header_style="bold", title="Ceilings, measured", title_justify="left")
    for title in ("", "1 thread", f"{report.num_threads} threads"):
        table.add_column(title, justify="left" if not title else "right")
    for ceiling in ceilings.ceilings:
        table.add_row(
            _label(ceiling, ceilings), *(_rate(ceiling, r) for r in (ceiling.one_thread, ceiling.all_threads))
        )
    console.print(table)
    console.print()
    table = Table(box=None, header_style="bold", title=f"Kernels: {report.isa}", title_justify="left")
    for title in ("kernel", "", "rows", "time", "GOP/s", "GB/s", "bound by", "share"):
        table.add_column(title, justify="left" if title in ("kernel", "", "bound by") else "right")
    last = ""
    for figure in report.figures:
        name = figure.work.kernel
        if last and name != last:
            table.add_section()
            table.add_row()
        table.add_row(*_cells(figure, name if name != last else ""))
        last = name
    console.print(table)
    for line in report.skipped:
        print(f"not measured: {line}", file=sys.stderr)


def _cells(figure: KernelFigure, name: str) -> tuple[str, ...]:
    work = figure.work
    return (
        name,
        work.detail,
        f"{work.num_rows}",
        _time(figure.time_s),
        f"{figure.ops_per_s / 1e9:,.0f}" if work.num_ops else "-",
        f"{figure.bytes_per_s / 1e9:,.1f}",
        figure.binding.name,
        f"{100 * figure.share:.0f}%",
    )


def _label(ceiling: Ceiling, ceilings: Ceilings) -> str:
    if ceiling.name == "dram":
        return f"dram, reading {ceilings.dram_bytes / 2**30:.2g} GiB"
    return ceiling.name


def _rate(ceiling: Ceiling, rate: float) -> str:
    return f"{rate / 1e9:,.1f} GB/s" if ceiling.is_memory else f"{rate / 1e9:,.0f} GOP/s"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:,.1f} us"


def _document(report: KernelReport, model: str) -> dict[str, Any]:
    return {
        "model": Path(model).name,
        "isa": report.isa,
        "threads": report.num_threads,
        "ceilings": asdict(report.ceilings),
        "kernels": [
            {
                "kernel": figure.work.kernel,
                "detail": figure.work.detail,
                "rows": figure.work.num_rows,
                "time_s": figure.time_s,
                "fastest_s": figure.fastest_s,
                "num_calls": figure.num_calls,
                "ops_per_s": figure.ops_per_s,
                "bytes_per_s": figure.bytes_per_s,
                "bound_by": figure.binding.name,
                "share": figure.share,
            }
            for figure in report.figures
        ],
        "skipped": list(report.skipped),
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    from pelton.cli.environment import describe_machine

    try:
        path.write_text(json.dumps({"machine": describe_machine(), **document}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot be written: {error.strerror}") from error
