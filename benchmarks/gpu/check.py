"""`make gpu-check`: proves and measures the GPU backend in one offline command.

    python -m benchmarks.gpu.check                   needs an NVIDIA GPU, torch, Triton, transformers; under 8 minutes
    python -m benchmarks.gpu.check --interpret       the same code on tiny shapes under Triton's interpreter, no GPU

Items run one after another, each in a process of its own with a limit: one that fails, hangs or breaks the device
costs nothing but itself, and a part of one that raises costs nothing but that part. Prints versions first, then a table
and verdicts, and writes all of it as JSON after each item (rows of the running one to item.json beside it, as they
come). Exit status: 0 results are right and every limit of speed is reached; 1 a result is wrong, or an item or a part
gave none; 2 no device, or no torch and Triton; 3 results are right, limits were missed or not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BEGUN_S = time.perf_counter()  # this process
TOTAL_S = 479.0
START_S = 15.0  # imports and questions to the driver, before the first item
ROOT = Path(__file__).resolve().parents[2]
NO_DEVICE = 2  # exit status
MISSED_LIMITS = 3
_KILL_S = 10.0
# Items that measure nothing: kernels may be compiled beside them, and for so long before the first other one.
UNTIMED = ("kernels", "same text", "batch invariance")
_WARM_S = 40.0
_MOST_WARMING = 8  # processes
PEER = "transformers bf16"
# Item -> seconds that it is sure to get on a GPU, in the order in which they run, and whether it can be interpreted.
# With START_S together they are TOTAL_S: what an item leaves, those after it may take.
ITEMS: dict[str, tuple[float, bool]] = {
    "kernels": (30.0, True),
    "same text": (30.0, True),
    "batch invariance": (35.0, True),
    "single stream": (55.0, True),
    "prefill 8192": (25.0, True),
    "attention": (45.0, False),
    "busy": (30.0, True),
    "throughput bf16": (65.0, True),
    PEER: (62.0, False),
    "throughput fp8": (52.0, True),
    "hand-over": (20.0, True),
    "products": (10.0, False),
    "flashinfer": (5.0, False),
}
# What they lack is no fault of Pelton's, or of the time that they were left.
OPTIONAL = (PEER, "products", "flashinfer")


def find(name: str, tiny: bool) -> Callable[[], Iterable[dict[str, Any]]]:
    """What the item runs; it may give its rows one by one, so that a limit costs only those to come."""
    from benchmarks.gpu import engine_items as engine

    if name == "kernels":
        from benchmarks.gpu.kernel_items import kernels

        return partial(kernels, tiny)
    if name == "attention":
        from benchmarks.gpu import attention

        return partial(attention.run, _cuda())
    if name == "products":
        from benchmarks.gpu import products

        return partial(products.run, _cuda())
    if name == "hand-over":
        from benchmarks.gpu.hand_over import hand_over

        return partial(hand_over, tiny)
    if name == "flashinfer":
        from benchmarks.gpu.flashinfer_item import beside_flashinfer

        return partial(beside_flashinfer, _cuda())
    if name == PEER:
        from benchmarks.gpu.transformers_item import continuous_batching

        return continuous_batching
    items: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "same text": partial(engine.same_text, tiny),
        "batch invariance": partial(engine.batch_invariance, tiny),
        "single stream": partial(engine.single_stream, tiny, BEGUN_S),
        "prefill 8192": partial(engine.prefill, tiny),
        "busy": partial(engine.busy, tiny),
        "throughput bf16": partial(engine.throughput, tiny, None),
        "throughput fp8": partial(engine.throughput, tiny, "fp8"),
    }
    return items[name]


def _cuda() -> Any:
    import torch

    return torch.device("cuda")


def run_item(name: str, tiny: bool, path: Path) -> None:
    """In this process; what comes of it goes to `path` as it comes."""
    from benchmarks.gpu.absent_packages import stand_in

    stand_in()
    start_s = time.perf_counter()
    result: dict[str, Any] = {"rows": []}
    try:
        for row in find(name, tiny)():
            result["rows"].append(row)
            _write(path, result)
    except Exception:
        result["error"] = traceback.format_exc()[-3000:]
    result["s"] = time.perf_counter() - start_s
    _write(path, result)


def _write(path: Path, result: dict[str, Any]) -> None:
    """At once or not at all: the process may be killed meanwhile."""
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(result, indent=1))
    beside.replace(path)


def run_apart(name: str, limit_s: float, folder: Path) -> dict[str, Any]:
    path = folder / "item.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--item", name, "--out", str(path)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PYTHONUNBUFFERED": "1"}
    start_s = time.perf_counter()
    error = None
    with (folder / "item.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, process_group=0)
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            error = f"took more than {limit_s:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # and what it has started
                os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(_KILL_S)
        except subprocess.TimeoutExpired:  # it hangs in the driver
            error = f"{error or 'ended'}, and could not be killed: what follows may find no memory"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    if error is None and "s" not in found:
        error = "the process died:\n" + (folder / "item.log").read_text()[-3000:]
    if error is not None:
        found["error"] = error
    return {**found, "s": time.perf_counter() - start_s}


def start_warming(folder: Path) -> list[subprocess.Popen[bytes]]:
    """Processes that compile what items will launch (`warm.py`), on half of the cores."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    count = max(1, min(_MOST_WARMING, (os.cpu_count() or 2) // 2))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu.warm"]
    with (folder / "warm.log").open("w") as log:
        return [
            subprocess.Popen(
                [*command, str(share), str(count), f"{major}{minor}"], cwd=ROOT, env=environment, stdout=log, stderr=log
            )
            for share in range(count)
        ]


def finish_warming(processes: list[subprocess.Popen[bytes]], limit_s: float) -> None:
    end_s = time.monotonic() + limit_s
    for process in processes:
        try:
            process.wait(max(0.0, end_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    processes.clear()


def describe() -> dict[str, Any]:
    """The device and what runs on it; nothing of it is worth failing for."""
    import numpy
    import torch
    import triton

    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
    }
    found |= {"torch": torch.__version__, "triton": triton.__version__, "numpy": numpy.__version__}
    for name in ("transformers", "flashinfer-python"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    found["device"] = "cpu (interpreted)"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "memory": f"{properties.total_memory / 2**30:.1f} GiB",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        found["driver, clock, power"] = said.splitlines()[0]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpret", action="store_true", help="tiny shapes under Triton's interpreter")
    parser.add_argument("--only", help="items whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="file for the results")
    parser.add_argument("--item", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
        sys.path.insert(0, str(ROOT / "src"))
    if arguments.item:
        run_item(arguments.item, False, arguments.out)
        return 0
    missing = [name for name in ("torch", "triton") if find_spec(name) is None]
    if missing:
        print(f"gpu-check: this Python has no {' and no '.join(missing)}: {sys.executable}", file=sys.stderr)
        return NO_DEVICE
    import torch

    if not arguments.interpret and not torch.cuda.is_available():
        print("gpu-check: no CUDA device: torch finds none (--interpret runs tiny shapes without)", file=sys.stderr)
        return NO_DEVICE
    report: dict[str, Any] = {**describe(), "items": {}}
    print("; ".join(f"{name} {value}" for name, value in report.items() if name != "items"), flush=True)
    names = [
        name
        for name, (_, tiny) in ITEMS.items()
        if (tiny or not arguments.interpret) and (arguments.only is None or arguments.only in name)
    ]
    folder = arguments.out.parent
    folder.mkdir(parents=True, exist_ok=True)
    _write(arguments.out, report)
    warming = [] if arguments.interpret else start_warming(folder)
    try:
        for place, name in enumerate(names):
            own_s, later_s = ITEMS[name][0], sum(ITEMS[later][0] for later in names[place + 1 :])
            if name not in UNTIMED:
                left_s = TOTAL_S - (time.perf_counter() - BEGUN_S) - own_s - later_s
                finish_warming(warming, min(_WARM_S, max(left_s, 0.0)))
            if arguments.interpret:
                run_item(name, True, folder / "item.json")
                result = json.loads((folder / "item.json").read_text())
            else:
                limit_s = TOTAL_S - (time.perf_counter() - BEGUN_S) - later_s
                result = run_apart(name, max(limit_s, 5.0), folder)
            report["items"][name] = result
            _write(arguments.out, report)
            _show(name, result)
    finally:
        finish_warming(warming, 0.0)
    status = conclude(report, judged=not arguments.interpret)
    _write(arguments.out, report)
    return status


def conclude(report: dict[str, Any], judged: bool = True) -> int:
    """Judge a report's items, add what was found, print it. The exit status."""
    from benchmarks.gpu.verdicts import failures, judge, wrong_results

    items = report["items"]
    report["wrong"] = wrong_results(items)
    broken = failures({name: result for name, result in items.items() if name not in OPTIONAL})
    verdicts = judge(items) if judged else []
    report["verdicts"] = [{**asdict(verdict), "verdict": verdict.word} for verdict in verdicts]
    for verdict in verdicts:
        reached = "-" if verdict.reached is None else f"{verdict.reached:.3g}"
        print(f"{verdict.word:13}{verdict.name}: {reached}, at least {verdict.least:.3g} asked")
    for wrong in report["wrong"]:
        print(f"WRONG        {wrong}")
    missed = [verdict for verdict in verdicts if verdict.word != "pass"]
    report["status"] = 1 if report["wrong"] or broken else MISSED_LIMITS if missed else 0
    said = ["results are right" if not report["wrong"] and not broken else "RESULTS ARE WRONG OR MISSING"]
    said += [f"no result: {', '.join(broken)}"] if broken else []
    said += [f"{len(verdicts) - len(missed)} of {len(verdicts)} limits of speed reached"] if verdicts else []
    print("; ".join(said))
    return int(report["status"])


def _show(name: str, result: dict[str, Any]) -> None:
    from benchmarks.gpu.engine_items import summary

    said = summary(result["rows"])
    if "error" in result:
        said = "; ".join(filter(None, (result["error"].strip().splitlines()[-1], said)))
    is_whole = "error" not in result and not any("failed" in row for row in result["rows"])
    print(f"{'ok' if is_whole else 'FAILED':7}{name:28}{result['s']:6.1f} s  {said}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
