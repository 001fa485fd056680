"""From process start to the first token, and the memory that it takes.

    python benchmarks/startup.py --model MODEL [--runs 5] [-- FLAGS OF pelton serve]

Each run starts `pelton serve` anew. Times are from the start of the process until /live and /ready first
answer 200 and until the first token of a 16-token prompt has arrived. Memory is summed over the server's
processes after that token: anonymous (its own) and file-backed (clean pages of the model's map, which the
system takes back when it needs them), and the peak of the whole.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

MEMORY_FIELDS = ("RssAnon", "RssFile", "VmHWM")


def process_tree(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid] + [found for child in children for found in process_tree(int(child))]


def memory_mb(pid: int) -> dict[str, float]:
    total = dict.fromkeys(MEMORY_FIELDS, 0.0)
    for each in process_tree(pid):
        status = Path(f"/proc/{each}/status").read_text()
        for name in MEMORY_FIELDS:
            found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
            total[name] += int(found[1]) / 1024 if found else 0.0
    return total


def wait_for(url: str) -> float:
    while True:
        try:
            with urllib.request.urlopen(url, timeout=1) as response:
                if response.status == 200:
                    return time.perf_counter()
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.01)


def first_token(url: str) -> float:
    body = json.dumps({"prompt": list(range(1000, 1016)), "max_tokens": 1, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        response.read()
    return time.perf_counter()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def measure(model: str, flags: list[str]) -> dict[str, float]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "pelton.cli.main", "serve", model, "--port", str(port), "--log-level", "warning"]
    started = time.perf_counter()
    with subprocess.Popen([*command, *flags]) as server:
        try:
            live, ready, token = wait_for(f"{url}/live"), wait_for(f"{url}/ready"), first_token(url)
            memory = memory_mb(server.pid)
        finally:
            server.terminate()
    times = {"live_s": live - started, "ready_s": ready - started, "first_token_s": token - started}
    return times | {f"{name}_mb": value for name, value in memory.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for _ in range(args.runs):
        runs.append(measure(args.model, args.flags))
        print(json.dumps({name: round(value, 2) for name, value in runs[-1].items()}), file=sys.stderr, flush=True)
    print(json.dumps({name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}))


if __name__ == "__main__":
    main()
