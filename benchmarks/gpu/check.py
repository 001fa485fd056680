"""`make gpu-check`: proves and measures the GPU backend in one offline command.

    python -m benchmarks.gpu.check                   needs an NVIDIA GPU, torch, Triton, transformers; under 8 minutes
    python -m benchmarks.gpu.check --interpret       the same code on tiny shapes under Triton's interpreter, no GPU

Items run one after another, each in a process of its own with a limit: one that fails, hangs or breaks the device
costs nothing but itself. Prints a table and writes JSON. Exit status: 0 all is well; 1 an item failed; 2 no device.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

TOTAL_S = 465.0
ROOT = Path(__file__).resolve().parents[2]
# Item -> seconds it may take on a GPU, in the order in which they run; 0 where the interpreter is no use.
ITEMS: dict[str, tuple[float, bool]] = {
    "kernels": (60.0, True),
    "same text": (60.0, True),
    "batch invariance": (60.0, True),
    "single stream": (80.0, True),
    "prefill 8192": (50.0, True),
    "attention": (75.0, False),
    "throughput 128/128 bf16": (50.0, True),
    "transformers 128/128 bf16": (75.0, False),
    "busy": (50.0, True),
    "throughput 128/128 fp8": (50.0, False),
    "throughput 1000/1000 fp8": (70.0, False),
    "throughput 2048/128 fp8": (60.0, False),
    "products": (90.0, False),
}


def find(name: str, tiny: bool) -> Callable[[], list[dict[str, Any]]]:
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
    if name.startswith("transformers"):
        from benchmarks.gpu.transformers_item import continuous_batching

        return continuous_batching
    items: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "same text": partial(engine.same_text, tiny),
        "batch invariance": partial(engine.batch_invariance, tiny),
        "single stream": partial(engine.single_stream, tiny),
        "prefill 8192": partial(engine.prefill, tiny),
        "busy": partial(engine.busy, tiny),
        "throughput 128/128 bf16": partial(engine.throughput, tiny, (128, 128), None, 1024, 512),
        "throughput 128/128 fp8": partial(engine.throughput, tiny, (128, 128), "fp8", 2048, 512),
        "throughput 1000/1000 fp8": partial(engine.throughput, tiny, (1000, 1000), "fp8", 256, 256),
        "throughput 2048/128 fp8": partial(engine.throughput, tiny, (2048, 128), "fp8", 256, 192),
    }
    return items[name]


def _cuda() -> Any:
    import torch

    return torch.device("cuda")


def run_item(name: str, tiny: bool, path: Path) -> None:
    """In this process; what comes of it goes to `path`."""
    from benchmarks.gpu.absent_packages import stand_in

    stand_in()
    start_s = time.perf_counter()
    try:
        result: dict[str, Any] = {"rows": find(name, tiny)()}
    except Exception:
        result = {"error": traceback.format_exc()[-3000:]}
    result["s"] = time.perf_counter() - start_s
    path.write_text(json.dumps(result))


def run_apart(name: str, limit_s: float, folder: Path) -> dict[str, Any]:
    path = folder / "item.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--item", name, "--out", str(path)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PYTHONUNBUFFERED": "1"}
    start_s = time.perf_counter()
    with (folder / "item.log").open("w") as log:
        try:
            subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=limit_s, check=False)
        except subprocess.TimeoutExpired:
            return {"error": f"took more than {limit_s:.0f} s", "s": time.perf_counter() - start_s}
    if not path.exists():
        return {"error": "the process died:\n" + (folder / "item.log").read_text()[-3000:], "s": limit_s}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def describe() -> dict[str, Any]:
    import torch
    import triton

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu (interpreted)",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


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
    import torch

    if not arguments.interpret and not torch.cuda.is_available():
        print("gpu-check: no CUDA device: torch finds none (--interpret runs tiny shapes without)", file=sys.stderr)
        return 2
    report = {**describe(), "items": {}}
    names = [name for name, (_, tiny) in ITEMS.items() if (tiny or not arguments.interpret)]
    start_s = time.perf_counter()
    for name in names:
        if arguments.only and arguments.only not in name:
            continue
        limit_s = min(ITEMS[name][0], TOTAL_S - (time.perf_counter() - start_s))
        if limit_s < 10.0:
            result: dict[str, Any] = {"error": "no time was left for it", "s": 0.0}
        elif arguments.interpret:
            run_item(name, True, arguments.out)
            result = json.loads(arguments.out.read_text())
        else:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            result = run_apart(name, limit_s, arguments.out.parent)
        report["items"][name] = result
        _show(name, result)
        arguments.out.write_text(json.dumps(report, indent=1))
    return int(any("error" in result for result in report["items"].values()))


def _show(name: str, result: dict[str, Any]) -> None:
    from benchmarks.gpu.engine_items import summary

    said = result["error"].strip().splitlines()[-1] if "error" in result else summary(result["rows"])
    print(f"{'FAILED' if 'error' in result else 'ok':7}{name:28}{result['s']:6.1f} s  {said}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
