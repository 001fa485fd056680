"""From process start to the first token, and the memory that it takes.

    python benchmarks/startup.py --model MODEL [--runs 5] [-- FLAGS OF pelton serve]

Each run starts `pelton serve` anew: cold, with no repacked weights on disk, and cached, with those of the run
before; the model file and Python's own files are in the system's page cache (one start that is not counted comes
first). Times are from the start of the process until its engine's process starts, until /live and /ready first
answer 200, and until the first token of a streamed completion of 16 words has arrived. `cpu_s` is what each
process has computed until then: on a machine with other work, the figure to compare.

Memory is taken after that token (cold: once the weights are on disk): anonymous, file-backed (clean pages that
processes share and the system takes back when it needs them), and the proportional share of both.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

PROMPT = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
MEMORY = ("Anonymous", "Rss", "Pss")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# As an installed package runs: its modules are compiled.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def process_tree(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid] + [found for child in children for found in process_tree(int(child))]


def role(pid: int) -> str:
    command = Path(f"/proc/{pid}/cmdline").read_text()
    return next((name for name in ("engine", "template") if f"{name}_" in command), "api")


def memory_mb(pid: int) -> dict[str, float]:
    """By process: RssAnon, RssFile and Pss, and their sums."""
    values: dict[str, float] = {}
    for each in process_tree(pid):
        rollup = Path(f"/proc/{each}/smaps_rollup").read_text()
        fields = {name: int(kb) / 1024 for name, kb in re.findall(r"^(\w+):\s+(\d+) kB", rollup, re.MULTILINE)}
        parts = {"anon": fields["Anonymous"], "file": fields["Rss"] - fields["Anonymous"], "pss": fields["Pss"]}
        for name, value in parts.items():
            values[f"{role(each)}_{name}_mb"] = value
            values[f"{name}_mb"] = values.get(f"{name}_mb", 0.0) + value
    return values


def cpu_times(pid: int) -> dict[str, float]:
    """Seconds computed by each process, and when the engine's began after the first."""
    values, starts = {}, {}
    for each in process_tree(pid):
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        values[f"{role(each)}_cpu_s"] = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
        starts[role(each)] = int(fields[19]) / TICKS_PER_S
    return values | {"engine_starts_s": starts["engine"] - starts["api"]}


def wait_for(url: str) -> float:
    while True:
        try:
            with urllib.request.urlopen(url, timeout=1) as response:
                if response.status == 200:
                    return time.perf_counter()
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.003)


def first_token(url: str) -> float:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "stream": True}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.readline().startswith(b"data: {")
        arrived = time.perf_counter()
        response.read()
    return arrived


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def measure(model: str, flags: list[str], cache: Path) -> dict[str, float]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "pelton.cli.main", "serve", model, "--port", str(port)]
    command += ["--log-level", "warning", "--weight-cache-dir", str(cache), *flags]
    started = time.perf_counter()
    with subprocess.Popen(command, env=ENVIRONMENT) as server:
        try:
            live, ready, token = wait_for(f"{url}/live"), wait_for(f"{url}/ready"), first_token(url)
            times = {"live_s": live - started, "ready_s": ready - started, "first_token_s": token - started}
            times |= cpu_times(server.pid)
            for _ in range(100):
                if any(cache.glob("*.weights")):
                    break
                time.sleep(0.1)
            return times | memory_mb(server.pid)
        finally:
            server.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {"cold": [], "cached": []}
    with tempfile.TemporaryDirectory(prefix="pelton-startup-", dir=Path.home()) as folder:
        cache = Path(folder) / "weights"
        measure(args.model, args.flags, cache)
        for _ in range(args.runs):
            shutil.rmtree(cache, ignore_errors=True)
            for kind, results in runs.items():
                results.append(measure(args.model, args.flags, cache))
                figures = {name: round(value, 2) for name, value in results[-1].items()}
                print(kind, json.dumps(figures), file=sys.stderr, flush=True)
    medians = {
        kind: {name: round(statistics.median(run[name] for run in results), 2) for name in results[0]}
        for kind, results in runs.items()
    }
    print(f"{'median of ' + str(args.runs):<24}" + "".join(f"{kind:>10}" for kind in medians))
    for name in medians["cold"]:
        print(f"{name:<24}" + "".join(f"{figures.get(name, float('nan')):>10.2f}" for figures in medians.values()))


if __name__ == "__main__":
    main()
